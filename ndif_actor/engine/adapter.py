"""The one module that touches transformers' model classes.

It builds a language model, causal, masked or encoder-decoder, without weights (on the meta device)
or with this rank's shard of them, and runs its forward on packed or padded rows. Sharding is
transformers' own `tp_plan`.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging as transformers_logging

from ndif_actor.engine.attention import IMPLEMENTATION
from ndif_actor.errors import ModelError

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of that name.

    Raises:
        ModelError: models are not served in a dtype of that name.
    """
    if name not in _DTYPES:
        raise ModelError(f"dtype {name!r} can't be served; choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load_config(folder: Path) -> PreTrainedConfig:
    """Read the configuration of the model in `folder`; no code of the folder is run."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{folder} has no model transformers knows: {error}") from error


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part of a configuration that describes the language model."""
    text: PreTrainedConfig = config.get_text_config(decoder=True)
    return text


def max_positions(model: PreTrainedModel, *, packed: bool) -> int:
    """Return the longest prompt a model takes, in tokens.

    A model whose rotary frequencies switch with the longest prompt of a forward ("longrope") takes
    packed prompts only up to the switch, so that nobody's frequencies depend on a neighbour.
    """
    text = text_config(model.config)
    known = getattr(text, "max_position_embeddings", None) or 1 << 20
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):  # a family may have one for each type of layer
        if packed and isinstance(part, dict) and part.get("rope_type") == "longrope":
            known = min(known, part["original_max_position_embeddings"])
    return int(known) - _first_position(model)


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Return how many tokens back the attention of some layers sees, if it is limited."""
    window: int | None = getattr(text_config(config), "sliding_window", None)
    return window


def config_dtype(config: PreTrainedConfig) -> str:
    """Return the dtype the weights were stored in."""
    dtype = getattr(config, "dtype", None) or torch.float32
    return str(dtype).removeprefix("torch.")


def build_without_weights(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model on the meta device: every module and shape, no weights.

    Raises:
        ModelError: the architecture is no language model of transformers.
    """
    attention = _attention(config) or "eager"
    try:
        with torch.device("meta"):
            model = _auto_class(config).from_config(
                config, dtype=dtype, attn_implementation=attention
            )
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ModelError(f"{config.model_type} can't be built: {error}") from error
    # Of the ways to run experts, only this one has shapes that don't depend on the routing.
    if model.get_experts_implementation()[""] is not None:
        model.set_experts_implementation("batched_mm")
    return _frozen(model)


def check_tensor_parallel(model: PreTrainedModel, world_size: int) -> None:
    """Check that `world_size` shards can hold this model, before any weight is read.

    Raises:
        ModelError: the family has no plan in transformers, or a head count is not divisible.
    """
    if world_size == 1:
        return
    config = text_config(model.config)
    family = f"{type(model).__name__} ({config.model_type})"
    if not model.tp_plan:
        raise ModelError(
            f"{family} has no tensor-parallel plan in transformers, so it is served with --tp 1 "
            f"only, not --tp {world_size}"
        )
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    for count, what in ((heads, "attention heads"), (kv_heads, "key/value heads")):
        if count % world_size:
            degrees = [n for n in range(1, heads + 1) if heads % n == 0 and kv_heads % n == 0]
            raise ModelError(
                f"{family} has {count} {what}, which --tp {world_size} does not divide; "
                f"possible degrees: {', '.join(map(str, degrees))}"
            )


def load_shard(
    folder: Path, dtype: torch.dtype, device: torch.device, world_size: int
) -> PreTrainedModel:
    """Load this rank's slice of the weights; torch.distributed is up when `world_size` > 1.

    Raises:
        ModelError: weights are missing, or stored in a format that can run code.
    """
    transformers_logging.disable_progress_bar()
    config = load_config(folder)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    options |= {"attn_implementation": _attention(config), "output_loading_info": True}
    if world_size > 1:
        # A replicated embedding needs no DTensor on its way and shows plain hook points.
        plan = _embedding_plan(config)
        options["distributed_config"] = DistributedConfig(tp_size=world_size, tp_plan=plan)
    try:
        loaded: Any = _auto_class(config).from_pretrained(
            folder, trust_remote_code=False, **options
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"the weights in {folder} can't be loaded: {error}") from error
    model, found = loaded
    if found["missing_keys"]:
        # transformers would go on with random numbers in their place.
        missing = sorted(found["missing_keys"])
        raise ModelError(
            f"the weights in {folder} lack {len(missing)} tensors of {type(model).__name__}: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    if dtype == torch.float64 and model.get_experts_implementation()[""] is not None:
        model.set_experts_implementation("eager")  # the default has no kernel in this dtype
    if world_size == 1:
        model = torch.nn.Module.to(model, device=device)
    return _frozen(model)


def unpackable_reason(model: PreTrainedModel) -> str | None:
    """Return why a model can't run on a packed row, as far as its class tells."""
    if has_encoder_and_decoder(model):
        return "its encoder and its decoder have rows of their own"
    if not model._supports_attention_backend:
        return "its attention can't be exchanged for one that keeps packed prompts apart"
    return None


def has_encoder_and_decoder(model: PreTrainedModel) -> bool:
    """Whether the model reads a prompt with an encoder, and another one with a decoder."""
    return bool(model.config.is_encoder_decoder)


def decoder_start(model: PreTrainedModel) -> int | None:
    """Return the token that begins what a decoder reads beside an encoder, if it has one."""
    token: int | None = getattr(model.config, "decoder_start_token_id", None)
    return token


def set_attention(model: PreTrainedModel, *, ragged: bool) -> None:
    """Let the model attend raggedly, or as transformers does by default."""
    own = "sdpa" if model._supports_sdpa else "eager"
    model.set_attn_implementation(IMPLEMENTATION if ragged else own)


def run_packed(model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
    """Run the model on one packed row; attention keeps to the segments it is `attending` to.

    Args:
        input_ids: `[1, T]`, int64.
        position_ids: `[1, T]`, starting anew in each segment from 0.
    """
    # A mask of four dimensions passes through transformers as it is; with none at all, it would
    # search the positions for packed sequences and wait for the device at each forward.
    mask = input_ids.new_zeros(1, 1, 1, 1)
    return _run(model, input_ids, position_ids, mask)


def run_alone(
    model: PreTrainedModel, input_ids: torch.Tensor, decoder_ids: torch.Tensor | None = None
) -> Any:
    """Run the model on `[1, sequence]` ids as transformers does when told nothing else."""
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
    if decoder_ids is not None:
        options["decoder_input_ids"] = decoder_ids
    return model(input_ids=input_ids, **options)


def run_padded(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    decoder: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Any:
    """Run the model on an ordinary left-padded batch.

    Args:
        input_ids: `[batch, sequence]`, int64; `position_ids` likewise.
        attention_mask: `[batch, sequence]`, 1 for real tokens and 0 for padding.
        decoder: of a model with an encoder and a decoder, the ids and the mask of the latter,
            `[batch, decoder_sequence]`.
    """
    if decoder is None:
        return _run(model, input_ids, position_ids, attention_mask)
    ids, mask = decoder
    return _run(
        model,
        input_ids,
        position_ids,
        attention_mask,
        decoder_input_ids=ids,
        decoder_attention_mask=mask,
    )


def _run(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    mask: torch.Tensor,
    **decoder: torch.Tensor,
) -> Any:
    known = inspect.signature(model.forward).parameters
    position_ids = position_ids + _first_position(model)
    options = {"position_ids": position_ids, "attention_mask": mask, "use_cache": False}
    options = {name: value for name, value in options.items() if name in known}
    return model(input_ids=input_ids, **options, **decoder)


def logits(output: Any) -> torch.Tensor:
    """Return the logits `[batch, sequence, vocabulary]` in what a forward returns."""
    found: torch.Tensor = output["logits"]
    return found


def shard_factors(model: PreTrainedModel) -> dict[str, int]:
    """How many parts are fused in the output of each module that the plan shards packed."""
    factors: dict[str, int] = {}
    for pattern, style in (model.tp_plan or {}).items():
        if style == "packed_colwise":
            regex = re.compile(pattern.replace(".", r"\.").replace("*", r"\d+"))
            factors |= {name: 2 for name, _ in model.named_modules() if regex.fullmatch(name)}
    return factors


_Auto = type[AutoModelForCausalLM | AutoModelForMaskedLM | AutoModelForSeq2SeqLM]


def _auto_class(config: PreTrainedConfig) -> _Auto:
    """Return what builds a model of this configuration.

    Most families of encoders have a causal variant, which a folder must name to get it.
    """
    if config.is_encoder_decoder and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return AutoModelForSeq2SeqLM
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        return AutoModelForCausalLM
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    is_named = causal is not None and causal.__name__ in (config.architectures or [])
    return AutoModelForCausalLM if is_named else AutoModelForMaskedLM


def _first_position(model: PreTrainedModel) -> int:
    """Return the position of a prompt's first token, which RoBERTa and its kin don't count from 0.

    Their position embeddings have a row for padding, and what lies below it is not used.
    """
    if model not in _first_positions:
        _first_positions[model] = max(
            (
                module.padding_idx + 1
                for name, module in model.named_modules()
                if name.endswith("position_embeddings")
                and getattr(module, "padding_idx", None) is not None
            ),
            default=0,
        )
    return _first_positions[model]


_first_positions: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()


def _attention(config: PreTrainedConfig) -> str | None:
    """Return the attention to build a model with; None where a family insists on its own."""
    family = _auto_class(config)._model_mapping.get(type(config), None)
    exchangeable = getattr(family, "_supports_attention_backend", False)
    return IMPLEMENTATION if exchangeable else None


def _embedding_plan(config: PreTrainedConfig) -> dict[str, str]:
    """Replicate the input embedding and what is tied to it: one tensor can't lie in two ways."""
    with torch.device("meta"):
        model = _auto_class(config).from_config(config)
    weight = model.get_input_embeddings().weight
    holders = [name for name, module in model.named_modules() if _holds(module, weight)]
    return dict.fromkeys(holders, "replicate")


def _holds(module: torch.nn.Module, parameter: torch.nn.Parameter) -> bool:
    return any(own is parameter for own in module._parameters.values())


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    model.eval()
    model.requires_grad_(False)
    return model
