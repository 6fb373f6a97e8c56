"""Small random models of many families, made by configuration and saved like real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 300

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_HEADS: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 80,
}
_SIX_HEADS: dict[str, Any] = {
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    # 3 does not divide it: the last of three shards is shorter
    "intermediate_size": 80,
}


def _config(name: str, **options: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: getattr(transformers, name)(**options)


_ENCODER: dict[str, Any] = {"num_attention_heads": 4, "intermediate_size": 80}

#: Families by the name tests use. All but the last five can be packed.
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _config("LlamaConfig", **_COMMON, **_HEADS),
    "llama6": _config("LlamaConfig", **_COMMON, **_SIX_HEADS),
    "qwen3": _config("Qwen3Config", **_COMMON, **_HEADS),
    "qwen3_6": _config("Qwen3Config", **_COMMON, **_SIX_HEADS),
    "gemma": _config("GemmaConfig", **_COMMON, **_HEADS),
    "gemma2": _config("Gemma2Config", **_COMMON, **_HEADS, sliding_window=4),
    "gemma3": _config("Gemma3TextConfig", **_COMMON, **_HEADS, sliding_window=4),
    "mistral": _config("MistralConfig", **_COMMON, **_HEADS, sliding_window=4),
    "phi3": _config(
        "Phi3Config", **_COMMON, **{k: v for k, v in _HEADS.items() if k != "head_dim"}
    ),
    "gpt2": _config(
        "GPT2Config",
        vocab_size=VOCAB_SIZE,
        n_embd=48,
        n_layer=3,
        n_head=4,
        n_positions=256,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "gpt_neox": _config(
        "GPTNeoXConfig", **_COMMON, num_attention_heads=4, intermediate_size=80, rotary_pct=0.5
    ),
    "qwen3_moe": _config(
        "Qwen3MoeConfig",
        **_COMMON,
        **_HEADS,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "bert": _config("BertConfig", **_COMMON, **_ENCODER),
    "roberta": _config("RobertaConfig", **_COMMON, **_ENCODER),
    "modernbert": _config(
        "ModernBertConfig",
        **_COMMON,
        **_ENCODER,
        global_attn_every_n_layers=2,
        local_attention=4,
        cls_token_id=0,
        sep_token_id=1,
    ),
    "deberta": _config(
        "DebertaV2Config", **_COMMON, **_ENCODER, relative_attention=True, pos_att_type=["c2p"]
    ),
    "t5": _config(
        "T5Config",
        vocab_size=VOCAB_SIZE,
        d_model=48,
        d_kv=12,
        d_ff=80,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    ),
    "bart": _config(
        "BartConfig",
        vocab_size=VOCAB_SIZE,
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=80,
        decoder_ffn_dim=80,
        max_position_embeddings=64,
        decoder_start_token_id=1,
    ),
    "mamba": _config(
        "MambaConfig", vocab_size=VOCAB_SIZE, hidden_size=48, num_hidden_layers=3, state_size=8
    ),
    "bloom": _config("BloomConfig", vocab_size=VOCAB_SIZE, hidden_size=48, n_layer=3, n_head=4),
}

UNPACKABLE = ("deberta", "mamba", "bloom")

#: Families with an encoder and a decoder.
ENCODER_DECODERS = ("t5", "bart")

#: Families of encoders, in which every token attends to every other.
ENCODERS = ("bert", "roberta", "modernbert", "deberta")


def make_model(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random model of `family` and its tokenizer in a new folder below `folder`.

    Weights are drawn wide enough that activations differ visibly between layers and tokens.
    """
    target = folder / f"{family}-{str(dtype).removeprefix('torch.')}"
    if (target / "config.json").is_file():
        return target
    torch.manual_seed(0)
    auto: Any = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    if family in ENCODER_DECODERS:
        auto = AutoModelForSeq2SeqLM
    model = auto.from_config(CONFIGS[family](), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
            else:  # norms and biases as well: a forgotten one must show
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(target)
    make_tokenizer().save_pretrained(target)
    return target


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token per byte, so that any text has known ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {char: 2 + i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
