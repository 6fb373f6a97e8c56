"""What a request would cost alone, and where its rows leave or fork, without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from ndif_actor.engine.depth import Stage, Strand, lay_out, row_layers
from ndif_actor.engine.layers import LayerStack
from ndif_actor.engine.members import whole_prompts
from ndif_actor.engine.program import Program
from ndif_actor.engine.shapes import Price
from ndif_actor.messages import Group
from ndif_client.wire.messages import Explanation, RowsAtDepth


def explain(
    request: str, group: Group, program: Program, layers: LayerStack | None, price: Price
) -> Explanation:
    """Lay the rows of one request out as its first forward would, alone.

    Args:
        request: its id.
        group: its prompts.
        program: its compiled graph.
        layers: of the model; None if rows stay in the batch through all of them.
        price: of its values.
    """
    strands = [feeding.strand for feeding in whole_prompts(group, program.at(0).reach)]
    if layers is None:
        tokens = sum(strand.length for strand in strands)
        note = "this model keeps all rows in the batch: none leaves early, none forks late"
        return _explanation(request, price, [RowsAtDepth(0, tokens)], (0, 0), [note])
    if group.decoding is not None:
        strands = [_sampling(strand, layers.tail) for strand in strands]
    stages = lay_out(strands, layers.tail)
    tokens = sum(strand.length for strand in strands)
    return _explanation(
        request,
        price,
        _depth(stages),
        (row_layers(stages, layers.tail), tokens * layers.num_layers),
        _notes(strands, stages, layers.tail),
    )


def _sampling(strand: Strand, tail: int) -> Strand:
    """A generation goes through all layers, and its last token on to the logits."""
    needed = strand.tail
    last = None if needed is None else tuple(sorted({*needed, strand.length - 1}))
    return msgspec.structs.replace(strand, last=tail, tail=last)


def _explanation(
    request: str,
    price: Price,
    depth: list[RowsAtDepth],
    counted: tuple[int, int],
    notes: list[str],
) -> Explanation:
    return Explanation(
        id=request,
        tokens=price.tokens,
        value_bytes=price.value_bytes,
        saved_bytes=price.saved_bytes,
        flops=price.flops,
        depth=depth,
        row_layers=counted,
        notes=notes,
    )


def _depth(stages: Sequence[Stage]) -> list[RowsAtDepth]:
    rows = {(max(stage.region, 0) + 1) // 2: stage.total for stage in stages}
    return [RowsAtDepth(before, total) for before, total in rows.items()]


def _notes(strands: Sequence[Strand], stages: Sequence[Stage], tail: int) -> list[str]:
    notes = []
    first = stages[0]
    if len(first.blocks) < len(strands):
        notes.append(
            f"{len(strands)} prompts begin as {len(first.blocks)}: equal ones are computed once, "
            "up to the first write into each"
        )
    shared = [m for block in first.blocks if len(block.members) > 1 for m in block.members]
    forks = Counter(strands[m].fork for m in shared if strands[m].fork <= strands[m].last)
    notes += [f"{_prompts(count)} forked {_where(region)}" for region, count in _sorted(forks)]
    # What is last needed inside of a layer leaves after it.
    leaving = Counter(strand.last | 1 for strand in strands if strand.last < tail)
    notes += [f"{_prompts(count)} done {_where(region)}" for region, count in _sorted(leaving)]
    if stages[-1].region == tail and stages[-1].total < stages[-2].total:
        notes.append(
            f"{stages[-1].total} of {stages[-2].total} rows go on to the final norm and the logits"
        )
    return notes


def _sorted(counts: Counter[int]) -> list[tuple[int, int]]:
    return sorted(counts.items())


def _prompts(count: int) -> str:
    return "1 prompt is" if count == 1 else f"{count} prompts are"


def _where(region: int) -> str:
    if region < 0:
        return "before the layers"
    return f"after layer {region // 2}" if region % 2 else f"from layer {region // 2} on"
