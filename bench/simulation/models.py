"""Models to simulate: a folder that admission can price requests for, and a size. No weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

from bench.simulation.cost import ModelSize

#: Llama 3.1, by the number of its parameters in thousand millions.
CONFIGS = {
    8: LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        dtype="bfloat16",
    ),
    70: LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        dtype="bfloat16",
    ),
    405: LlamaConfig(
        vocab_size=128_256,
        hidden_size=16_384,
        intermediate_size=53_248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        dtype="bfloat16",
    ),
}


def write_folder(config: LlamaConfig, folder: Path) -> None:
    """Write what the admission of a server reads: the configuration, and some tokenizer.

    Prompts are token ids here, so what the tokenizer knows does not matter.
    """
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)


def size(config: LlamaConfig) -> ModelSize:
    """Return what the time of a forward depends on."""
    head_dim = config.hidden_size // config.num_attention_heads
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    attention = config.hidden_size * head_dim * (2 * config.num_attention_heads + 2 * kv_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    embeddings = 2 * config.vocab_size * config.hidden_size
    return ModelSize(
        parameters=config.num_hidden_layers * (attention + mlp) + embeddings,
        layers=config.num_hidden_layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )
