"""Whether a loaded model gives each prompt of a packed row what it gives it alone.

Asked of the real weights at load, because no property of the code answers it: a model may ignore
positions, keep a state, or attend by means of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ndif_actor.engine import adapter, leaves
from ndif_actor.engine.attention import attending
from ndif_actor.engine.batch import pack, pad

#: Largest relative error of the logits that rounding may explain, in single and in half precision.
_TOLERANCE = 1e-3
_TOLERANCE_HALF = 0.1

_LENGTHS = (5, 3, 7)


def packing_fault(model: PreTrainedModel, vocab_size: int, device: torch.device) -> str | None:
    """Return why this model's requests can't share a forward, or None if they can.

    All ranks must call it together; they reach the same answer.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (*_LENGTHS, 4)
    ]
    subject, *others = prompts
    half = model.dtype.itemsize < torch.float32.itemsize
    tolerance = _TOLERANCE_HALF if half else _TOLERANCE
    try:
        alone = _padded_logits(model, subject, device)
        shared = _packed_logits(model, [subject, *others], device)
        elsewhere = _packed_logits(model, [subject, *(ids[::-1] for ids in others)], device)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"its forward fails on a packed row: {error}"
    if _distance(shared, alone) > tolerance:
        return "a prompt in a packed row does not get the logits it gets alone"
    if _distance(shared, elsewhere) > tolerance / 10:
        return "the logits of a prompt depend on its neighbours in a packed row"
    return None


def _padded_logits(model: PreTrainedModel, ids: list[int], device: torch.device) -> torch.Tensor:
    batch = pad([[[ids]]], device)
    assert batch.attention_mask is not None
    with torch.inference_mode(), attending(None):
        output = adapter.run_padded(
            model, batch.input_ids, batch.position_ids, batch.attention_mask
        )
    return _logits(output)[0]


def _packed_logits(
    model: PreTrainedModel, prompts: Sequence[list[int]], device: torch.device
) -> torch.Tensor:
    """Return the logits `[length, vocabulary]` of the first prompt."""
    batch = pack([[[ids]] for ids in prompts], device)
    with torch.inference_mode(), attending(batch.segments):
        output = adapter.run_packed(model, batch.input_ids, batch.position_ids)
    start = sum(len(ids) for ids in prompts if len(ids) < len(prompts[0]))
    return _logits(output)[0, start : start + len(prompts[0])]


def _logits(output: object) -> torch.Tensor:
    return dict(leaves.walk(output))["logits"].float()


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
