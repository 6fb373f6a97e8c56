"""Whether a loaded model gives a prompt what it gives it alone, padded and in a packed row.

Asked of the real weights at load, because no property of the code answers it: a model may ignore
positions, keep a state, or attend by means of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from ndif_actor.engine import adapter, ops
from ndif_actor.engine.attention import attending
from ndif_actor.engine.batch import Feeding, pack, pack_prompts, pad, pad_both
from ndif_actor.engine.depth import Strand
from ndif_actor.engine.hookpoints import Site
from ndif_actor.engine.layers import LayerStack
from ndif_actor.engine.moments import recording_moments
from ndif_actor.engine.stages import changing_stages
from ndif_actor.errors import ModelError
from ndif_client.wire.graph import HookPoint

#: Largest relative error of the logits that rounding may explain, in single and in half precision.
_TOLERANCE = 1e-3
_TOLERANCE_HALF = 0.1

#: The prompt that is looked at, then its neighbours, shorter and longer.
_LENGTHS = (5, 3, 7, 4)


def packing_fault(model: PreTrainedModel, vocab_size: int, device: torch.device) -> str | None:
    """Return why this model's requests can't share a forward, or None if they can.

    All ranks must call it together; they reach the same answer.
    """
    subject, *others = _prompts(vocab_size, _LENGTHS)
    alone = _alone(model, subject, device)
    try:
        adapter.set_attention(model, ragged=True)
        shared = _packed_logits(model, [subject, *others], device)
        elsewhere = _packed_logits(model, [subject, *(ids[::-1] for ids in others)], device)
    except ops.REFUSALS as error:
        return f"its forward fails on a packed row: {error}"
    if not _distance(shared, alone) <= _tolerance(model):
        return "a prompt in a packed row does not get the logits it gets alone"
    if not _distance(shared, elsewhere) <= _tolerance(model) / 10:
        return "the logits of a prompt depend on its neighbours in a packed row"
    return None


def depth_fault(
    model: PreTrainedModel, layers: LayerStack, vocab_size: int, device: torch.device
) -> str | None:
    """Return why a packed row can't be laid out anew between this model's layers, or None.

    On the meta device only what fails is found. All ranks must call it together; they reach the
    same answer.
    """
    short, long, twin = _prompts(vocab_size, (3, 5, 4))
    middle = layers.num_layers // 2 * 2 + 1  # the output of a layer
    strands = [
        Strand(length=3, last=middle - 1),
        Strand(length=5, last=layers.tail, tail=(4,)),
        Strand(length=4, last=layers.tail, fork=middle, family="twin"),
        Strand(length=4, last=layers.tail, family="twin"),
    ]
    prompts = (short, long, twin, twin)
    feedings = [Feeding(ids, strand) for ids, strand in zip(prompts, strands, strict=True)]
    batch = pack(feedings, layers.tail, device)
    assert batch.packing is not None
    try:
        with (
            torch.inference_mode(),
            attending(None) as record,
            changing_stages(model, layers, batch.packing, record),
        ):
            output = adapter.run_packed(model, batch.input_ids, batch.position_ids)
    except ops.REFUSALS as error:
        return f"its forward fails when rows leave it: {error}"
    if device.type == "meta":
        return None
    got = _logits(output)[0]
    wanted = [_packed_logits(model, [ids], device) for ids in (twin, twin, long)]
    wanted[2] = wanted[2][-1:]
    if got.shape != torch.cat(wanted).shape:
        return "not every row that leaves it is gone"
    if not _distance(got, torch.cat(wanted)) <= _tolerance(model) / 10:
        return "rows that leave it change what the others get"
    return None


def stale_operations(
    model: PreTrainedModel, layers: LayerStack, sites: Mapping[HookPoint, Site], vocab_size: int
) -> dict[HookPoint, str]:
    """Return the sites around the layers whose rows are not those of the batch at that time.

    What the loop over the layers hands to each of them is laid out anew only when it enters one,
    so an operation of the loop itself still sees it as it was. Found on the meta device, in a
    forward that loses rows at each boundary.
    """
    strands = [Strand(length=1, last=region) for region in range(layers.tail)]
    strands.append(Strand(length=3, last=layers.tail, tail=(2,)))
    prompts = _prompts(vocab_size, [strand.length for strand in strands])
    feedings = [Feeding(ids, strand) for ids, strand in zip(prompts, strands, strict=True)]
    batch = pack(feedings, layers.tail, torch.device("meta"))
    packing = batch.packing
    assert packing is not None
    inside = layers.boundaries[0].path
    around = {
        path for path, _ in model.named_modules() if not path or inside.startswith(f"{path}.")
    }
    stale: dict[HookPoint, str] = {}

    def look(point: HookPoint, tensor: torch.Tensor) -> None:
        site = sites.get(point)
        if site is not None and point.operation:
            total = packing.stages[packing.current].total
            if tensor.shape[site.token_axis] != total:
                stale[point] = (
                    "the loop over the layers holds it as it was at first, though rows may have "
                    "left the batch or forked since; read what the layer is given, from inside"
                )

    with (
        torch.inference_mode(),
        attending(None) as record,
        changing_stages(model, layers, packing, record),
        recording_moments(model, {}, look, around),
    ):
        adapter.run_packed(model, batch.input_ids, batch.position_ids)
    return stale


def padding_fault(model: PreTrainedModel, vocab_size: int, device: torch.device) -> str | None:
    """Return why prompts of unequal length can't share a padded batch, or None if they can.

    Leaves the model with the attention that transformers gives it by default.

    Raises:
        ModelError: not even a prompt without padding gets the logits it gets alone.
    """
    # Where there is a decoder too, it reads them backwards.
    long, short = _prompts(vocab_size, (max(_LENGTHS), min(_LENGTHS)))
    alone = [_alone(model, ids, device) for ids in (long, short)]
    unpadded = _padded_logits(model, [long], device)
    padded = _padded_logits(model, [short, long], device)
    if not _distance(unpadded, alone[0]) <= _tolerance(model):
        raise ModelError(
            f"{type(model).__name__} numbers positions in a way of its own, so its results could "
            "be wrong; it is not served"
        )
    if not _distance(padded, alone[1]) <= _tolerance(model):
        return "padding changes what this model gives a prompt"
    return None


def _prompts(vocab_size: int, lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def _alone(model: PreTrainedModel, ids: list[int], device: torch.device) -> torch.Tensor:
    """Return the logits `[length, vocabulary]` that transformers gives a prompt by default."""
    adapter.set_attention(model, ragged=False)
    with torch.inference_mode():
        decoder = None
        if adapter.has_encoder_and_decoder(model):
            decoder = torch.tensor([ids[::-1]], device=device)
        return _logits(adapter.run_alone(model, torch.tensor([ids], device=device), decoder))[0]


def _padded_logits(
    model: PreTrainedModel, prompts: Sequence[list[int]], device: torch.device
) -> torch.Tensor:
    """Return the logits `[length, vocabulary]` of the first prompt."""
    if adapter.has_encoder_and_decoder(model):
        batch, _ = pad_both([[prompts]], [[[ids[::-1] for ids in prompts]]], device)
    else:
        batch, _ = pad([[prompts]], device)
    assert batch.attention_mask is not None
    with torch.inference_mode(), attending(None):
        output = adapter.run_padded(
            model, batch.input_ids, batch.position_ids, batch.attention_mask, batch.decoder
        )
    return _logits(output)[0, -len(prompts[0]) :]


def _packed_logits(
    model: PreTrainedModel, prompts: Sequence[list[int]], device: torch.device
) -> torch.Tensor:
    """Return the logits `[length, vocabulary]` of the first prompt."""
    batch = pack_prompts(prompts, device)
    assert batch.packing is not None
    with torch.inference_mode(), attending(batch.packing.layouts[0]):
        output = adapter.run_packed(model, batch.input_ids, batch.position_ids)
    start = sum(len(ids) for ids in prompts if len(ids) < len(prompts[0]))
    return _logits(output)[0, start : start + len(prompts[0])]


def _tolerance(model: PreTrainedModel) -> float:
    half = model.dtype.itemsize < torch.float32.itemsize
    return _TOLERANCE_HALF if half else _TOLERANCE


def _logits(output: object) -> torch.Tensor:
    return adapter.logits(output).float()


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
