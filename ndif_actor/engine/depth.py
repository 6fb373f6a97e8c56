"""A batch that is ragged in depth: which rows each region of the forward computes.

A strand is one sequence's part of a pass. Strands of a family read the same tokens, so their rows
are equal until a program first writes into one of them; up to there they are computed once (*late
fork*). A strand whose last need is in region k is not in the batch after it (*early leave*); in
the tail, only the positions that somebody looks at remain. Regions are those of `layers`. Pure: no
tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

#: The region of the first write into a strand that nobody writes into.
NEVER = 1 << 30


class Strand(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence's part of a pass.

    Attributes:
        length: tokens it is fed.
        past: tokens of it that are in the KV cache.
        last: the last region that it is needed in.
        fork: the region of the first write into it.
        family: equal for strands whose rows are equal before any write; None if there are none.
        tail: positions among the fed tokens that are needed in the tail; None for all of them.
    """

    length: int
    past: int = 0
    last: int
    fork: int = NEVER
    family: Hashable = None
    tail: tuple[int, ...] | None = None


class Block(msgspec.Struct, frozen=True):
    """Rows `start` to `start + len(positions)` of a stage, for one strand or several.

    Attributes:
        members: numbers of the strands, in order.
        positions: which of the fed tokens the rows are; None for all `length` of them.
    """

    members: tuple[int, ...]
    start: int
    length: int
    positions: tuple[int, ...] | None

    @property
    def count(self) -> int:
        """How many rows it has."""
        return self.length if self.positions is None else len(self.positions)


class Stage(msgspec.Struct, frozen=True):
    """How the packed row lies from one region on.

    Attributes:
        region: the first region with this layout; -1 from the beginning of the forward.
        blocks: in the order of their rows.
        total: rows in all.
        taken: for each row, the row of the stage before that it continues.
        origin: for each row, the row of the first stage that it came from.
    """

    region: int
    blocks: tuple[Block, ...]
    total: int
    taken: Rows
    origin: Rows


def lay_out(strands: Sequence[Strand], tail: int) -> list[Stage]:
    """Return the stages of a pass; the last one may be empty if nobody needs the end.

    Args:
        strands: all of them.
        tail: the number of the region after the last layer.
    """
    stages: list[Stage] = []
    changes = {-1, *(s.last + 1 for s in strands), *(s.fork for s in strands)}
    if any(strand.tail is not None and strand.last >= tail for strand in strands):
        changes.add(tail)
    for region in sorted(changes):
        if region > tail:
            break
        blocks = _blocks(strands, region, tail)
        stage = _stage(region, blocks, stages)
        if not stages or not _continues(stage, stages[-1]):
            stages.append(stage)
    return stages


def row_layers(stages: Sequence[Stage], tail: int) -> int:
    """Return how many rows pass through layers, counted once per layer."""
    ends = [stage.region for stage in stages[1:]] + [tail]
    return sum(
        stage.total * len(range(_even(max(stage.region, 0)), min(end, tail), 2))
        for stage, end in zip(stages, ends, strict=True)
    )


def _even(region: int) -> int:
    """Return the first region from this one on that is the inside of a layer."""
    return region + region % 2


def attention_order(strand: Strand) -> tuple[int, int]:
    """Sort strands so that those that can attend in one call lie side by side.

    First those without a past, then chunks of prompts, then single tokens.
    """
    if strand.past == 0:
        return 0, strand.length
    return (1, strand.length) if strand.length > 1 else (2, strand.past)


def _blocks(strands: Sequence[Strand], region: int, tail: int) -> list[Block]:
    together: dict[Hashable, list[int]] = {}
    for number, strand in enumerate(strands):
        if strand.last < region:
            continue
        shares = strand.family is not None and strand.fork > region
        together.setdefault((strand.family,) if shares else number, []).append(number)
    groups = sorted(together.values(), key=lambda g: (*attention_order(strands[g[0]]), g[0]))
    blocks, start = [], 0
    for members in groups:
        length = strands[members[0]].length
        positions = None
        if region >= tail:
            positions = _union((strands[m].tail for m in members), length)
        block = Block(tuple(members), start, length, positions)
        blocks.append(block)
        start += block.count
    return blocks


def _union(needs: Iterable[tuple[int, ...] | None], length: int) -> tuple[int, ...] | None:
    found: set[int] = set()
    for need in needs:
        if need is None:
            return None
        found.update(need)
    return None if len(found) == length else tuple(sorted(found))


def _continues(stage: Stage, before: Stage) -> bool:
    """Whether all rows stay where they are, whoever has lost interest in them."""
    return stage.total == before.total and bool((stage.taken == np.arange(stage.total)).all())


def _stage(region: int, blocks: list[Block], stages: list[Stage]) -> Stage:
    total = sum(block.count for block in blocks)
    if not stages:
        everything = np.arange(total, dtype=np.int64)
        return Stage(region, tuple(blocks), total, everything, everything)
    before = stages[-1]
    starts = {member: block.start for block in before.blocks for member in block.members}
    taken = [
        starts[block.members[0]]
        + (np.arange(block.length) if block.positions is None else np.array(block.positions))
        for block in blocks
    ]
    rows = np.concatenate(taken) if taken else np.empty(0, dtype=np.int64)
    rows = rows.astype(np.int64, copy=False)
    return Stage(region, tuple(blocks), total, rows, before.origin[rows])
