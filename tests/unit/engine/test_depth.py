"""Which rows each region computes: every strand finds its own, as long as it needs them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ndif_actor.engine.depth import NEVER, Strand, lay_out, row_layers

LAYERS = 4
TAIL = 2 * LAYERS


@st.composite
def batches(draw: st.DrawFn) -> list[Strand]:
    strands = []
    for _ in range(draw(st.integers(1, 7))):
        family = draw(st.sampled_from([None, "a", "b"]))
        # Strands of a family read the same tokens, so they are equally long.
        length = {"a": 3, "b": 5}.get(str(family)) or draw(st.integers(1, 6))
        past = draw(st.sampled_from([0, 0, 9])) if family is None else 0
        tail = draw(st.none() | st.sets(st.integers(0, length - 1)))
        strands.append(
            Strand(
                length=length,
                past=past,
                last=draw(st.integers(-1, TAIL)),
                fork=draw(st.integers(-1, TAIL) | st.just(NEVER)),
                family=family,
                tail=None if tail is None else tuple(sorted(tail)),
            )
        )
    return strands


@given(strands=batches())
@settings(max_examples=300, deadline=None)
def test_every_strand_finds_its_own_rows_in_every_region_that_needs_them(
    strands: list[Strand],
) -> None:
    stages = lay_out(strands, TAIL)
    # A token of a family is the same for all members; which rows it went through is noted.
    first = [
        (strands[block.members[0]].family or block.members[0], position)
        for block in stages[0].blocks
        for position in range(block.length)
    ]
    rows = first
    assert stages[0].region == -1
    for number, stage in enumerate(stages):
        if number:
            rows = [rows[taken] for taken in stage.taken]
        assert rows == [first[origin] for origin in stage.origin]
        assert len(rows) == stage.total
        end = stages[number + 1].region if number + 1 < len(stages) else TAIL + 1
        for region in range(stage.region, end):
            for index, strand in enumerate(strands):
                found = [block for block in stage.blocks if index in block.members]
                if strand.last < region:
                    continue
                (block,) = found
                positions = range(block.length) if block.positions is None else block.positions
                own = rows[block.start : block.start + block.count]
                assert own == [(strand.family or index, p) for p in positions]
                needed = strand.tail if region == TAIL else None
                wanted = range(strand.length) if needed is None else needed
                assert set(wanted) <= set(positions)
                if strand.fork <= region:
                    alive = [m for m in block.members if strands[m].last >= region]
                    assert alive == [index], "somebody else's writes would be seen"


@given(strands=batches())
@settings(max_examples=100, deadline=None)
def test_no_more_rows_are_computed_than_without_leaving_and_forking(strands: list[Strand]) -> None:
    stages = lay_out(strands, TAIL)

    naive = sum(strand.length for strand in strands)
    assert all(stage.total <= naive for stage in stages)
    assert row_layers(stages, TAIL) <= naive * LAYERS


def test_rows_leave_after_the_last_layer_that_needs_them() -> None:
    stages = lay_out([Strand(length=3, last=3), Strand(length=2, last=TAIL)], TAIL)

    assert [(stage.region, stage.total) for stage in stages] == [(-1, 5), (4, 2)]
    assert row_layers(stages, TAIL) == 5 + 5 + 2 + 2


def test_a_sweep_shares_its_rows_up_to_each_first_write() -> None:
    strands = [Strand(length=2, last=TAIL, fork=2 * k + 1, family="sweep") for k in range(LAYERS)]

    stages = lay_out(strands, TAIL)

    # Each forks at the output of its layer; the last one keeps the rows they all shared.
    assert [(stage.region, stage.total) for stage in stages] == [(-1, 2), (1, 4), (3, 6), (5, 8)]
    assert row_layers(stages, TAIL) == 2 + 4 + 6 + 8


def test_the_tail_sees_only_the_positions_that_somebody_looks_at() -> None:
    strands = [
        Strand(length=4, last=TAIL, tail=(3,), family="same"),
        Strand(length=4, last=TAIL, tail=(1, 3), family="same"),
        Strand(length=2, last=TAIL, tail=None),
    ]

    last = lay_out(strands, TAIL)[-1]

    assert last.region == TAIL
    assert [(block.members, block.positions) for block in last.blocks] == [
        ((2,), None),
        ((0, 1), (1, 3)),
    ]


def test_sequences_lie_side_by_side_that_can_attend_in_one_call() -> None:
    strands = [
        Strand(length=1, past=30, last=TAIL),
        Strand(length=5, last=TAIL),
        Strand(length=4, past=16, last=TAIL),
        Strand(length=1, past=2, last=TAIL),
        Strand(length=5, last=TAIL),
        Strand(length=2, last=TAIL),
    ]

    (stage,) = lay_out(strands, TAIL)

    assert [block.members[0] for block in stage.blocks] == [5, 1, 4, 2, 3, 0]
