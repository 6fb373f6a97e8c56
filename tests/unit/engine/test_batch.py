"""The ragged batch: every token belongs to one owner, who sees it as if it ran alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ndif_actor.engine.batch import Batch, PackedRows, Rows, pack_prompts, pad, padding_mask
from ndif_actor.engine.hookpoints import Site
from ndif_client.wire.graph import HookPoint

CPU = torch.device("cpu")
WIDTH, HEADS = 3, 2


def site(*shape: int | str) -> Site:
    if "batch*sequence" in shape:
        batch_axis, token_axis = None, shape.index("batch*sequence")
    else:
        batch_axis, token_axis = shape.index("batch"), shape.index("sequence")
    return Site(
        point=HookPoint("module", "output"),
        order=0,
        shape=shape,
        dtype=torch.float64,
        batch_axis=batch_axis,
        token_axis=token_axis,
        packed_shape=None,
    )


#: Tensors of a model, as functions of its input ids, and how a user sees them.
TENSORS: dict[str, tuple[Site, Callable[[torch.Tensor], torch.Tensor]]] = {
    "ids": (site("batch", "sequence"), lambda ids: ids.clone()),
    "hidden": (
        site("batch", "sequence", WIDTH),
        lambda ids: ids[..., None] * 10 + torch.arange(WIDTH),
    ),
    "heads": (
        site("batch", HEADS, "sequence", WIDTH),
        lambda ids: (
            ids[:, None, :, None] * 100
            + torch.arange(HEADS)[:, None, None] * 10
            + torch.arange(WIDTH)
        ),
    ),
    "transposed": (
        site("batch", WIDTH, "sequence"),
        lambda ids: ids[:, None] * 10 + torch.arange(WIDTH)[:, None],
    ),
    "flat": (
        site("batch*sequence", WIDTH),
        lambda ids: ids.flatten()[:, None] * 10 + torch.arange(WIDTH),
    ),
}

every_tensor = pytest.mark.parametrize("name", TENSORS)

#: Lengths of the prompts: per group, per invoke.
Lengths = list[list[list[int]]]

lengths = st.lists(
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=3),
    min_size=1,
    max_size=4,
)


def numbered(groups: Lengths) -> list[list[list[list[int]]]]:
    """Give each token of all prompts an id of its own, from 1."""
    counter = iter(range(1, 10**6))
    return [
        [[[next(counter) for _ in range(n)] for n in invoke] for invoke in invokes]
        for invokes in groups
    ]


def alone(prompts: list[list[int]], name: str) -> torch.Tensor:
    """What a user sees: the tensor of the prompts alone, left-padded with zeros."""
    where, compute = TENSORS[name]
    longest = max(map(len, prompts))
    rows = []
    for ids in prompts:
        tokens = where.token_axis
        real = compute(torch.tensor([ids]))
        shape = list(real.shape)
        shape[tokens] = longest - len(ids)
        rows.append(torch.cat([real.new_zeros(shape), real], tokens))
    return torch.cat(rows, where.batch_axis or 0)


def packed(ids: list[list[list[list[int]]]]) -> tuple[Batch, list[list[Rows]]]:
    batch = pack_prompts([p for invokes in ids for prompts in invokes for p in prompts], CPU)
    assert batch.packing is not None
    rows: list[list[Rows]] = []
    first = 0
    for invokes in ids:
        rows.append([])
        for prompts in invokes:
            strands = range(first, first + len(prompts))
            rows[-1].append(PackedRows(batch.packing, strands, list(map(len, prompts))))
            first += len(prompts)
    return batch, rows


def layouts(ids: list[list[list[list[int]]]]) -> list[tuple[Batch, list[list[Rows]]]]:
    return [packed(ids), pad(ids, CPU)]


@every_tensor
@given(groups=lengths)
@settings(max_examples=40, deadline=None)
def test_each_invoke_reads_its_own_tokens_as_if_it_ran_alone(name: str, groups: Lengths) -> None:
    ids = numbered(groups)
    where, compute = TENSORS[name]

    for batch, all_rows in layouts(ids):
        tensor = compute(batch.input_ids)
        for group, rows in zip(ids, all_rows, strict=True):
            for prompts, mine in zip(group, rows, strict=True):
                assert torch.equal(mine.read(tensor, where), alone(prompts, name))


@every_tensor
@given(groups=lengths, data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_write_changes_the_tokens_of_one_invoke_and_no_other(
    name: str, groups: Lengths, data: st.DataObject
) -> None:
    ids = numbered(groups)
    where, compute = TENSORS[name]
    group = data.draw(st.integers(0, len(ids) - 1))
    invoke = data.draw(st.integers(0, len(ids[group]) - 1))

    for batch, all_rows in layouts(ids):
        tensor = compute(batch.input_ids)
        written = -alone(ids[group][invoke], name) - 7  # its padding is not zero

        all_rows[group][invoke].write(tensor, where, written)

        own = torch.tensor([token for prompt in ids[group][invoke] for token in prompt])
        mine = torch.isin(batch.input_ids, own).long()
        theirs = compute(mine) != compute(torch.zeros_like(mine))
        before = compute(batch.input_ids)
        assert torch.equal(tensor, torch.where(theirs, -before - 7, before))
        real = alone(ids[group][invoke], name) != 0
        seen = all_rows[group][invoke].read(tensor, where)
        assert torch.equal(seen[real], written[real])


@given(groups=lengths)
@settings(max_examples=40, deadline=None)
def test_a_packed_row_holds_each_token_once_with_its_position(groups: Lengths) -> None:
    ids = numbered(groups)

    batch, _ = packed(ids)

    assert sorted(batch.input_ids[0].tolist()) == list(range(1, batch.input_ids.numel() + 1))
    positions = {
        token: position
        for group in ids
        for invoke in group
        for prompt in invoke
        for position, token in enumerate(prompt)
    }
    assert batch.position_ids[0].tolist() == [positions[t] for t in batch.input_ids[0].tolist()]


@given(groups=lengths)
@settings(max_examples=40, deadline=None)
def test_the_segments_of_a_packed_row_are_its_prompts(groups: Lengths) -> None:
    ids = numbered(groups)
    batch, _ = packed(ids)
    row = batch.input_ids[0].tolist()

    assert batch.packing is not None
    segments = batch.packing.layouts[0].fresh
    found = [
        row[start : start + segment.length]
        for segment in segments
        for start in range(
            segment.start, segment.start + segment.count * segment.length, segment.length
        )
    ]

    prompts = [prompt for group in ids for invoke in group for prompt in invoke]
    assert sorted(found) == sorted(prompts)
    assert len({segment.length for segment in segments}) == len(segments)


@given(groups=lengths)
@settings(max_examples=40, deadline=None)
def test_a_padded_batch_is_an_ordinary_left_padded_one(groups: Lengths) -> None:
    ids = numbered(groups)

    batch, _ = pad(ids, CPU)

    prompts = [prompt for group in ids for invoke in group for prompt in invoke]
    longest = max(map(len, prompts))
    assert batch.input_ids.tolist() == [[0] * (longest - len(p)) + p for p in prompts]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [
        [0] * (longest - len(p)) + [1] * len(p) for p in prompts
    ]
    assert batch.position_ids.tolist() == [
        [0] * (longest - len(p)) + list(range(len(p))) for p in prompts
    ]


def test_a_read_of_equally_long_prompts_copies_nothing() -> None:
    _, rows = packed([[[[1, 2]]], [[[3, 4], [5, 6]]]])
    tensor = torch.zeros(1, 6, WIDTH)

    view = rows[1][0].read(tensor, TENSORS["hidden"][0])
    tensor[:] = 5

    assert view.shape == (2, 2, WIDTH)
    assert (view == 5).all()


def test_a_shard_of_a_tensor_is_read_at_its_own_width() -> None:
    _, rows = packed([[[[1, 2], [3]]]])
    shard = torch.ones(1, 3, 1)  # one of three columns is here

    assert rows[0][0].read(shard, TENSORS["hidden"][0]).shape == (2, 2, 1)


def test_the_mask_shows_where_the_padding_is() -> None:
    assert padding_mask([1, 3], CPU).tolist() == [[0, 0, 1], [1, 1, 1]]
    assert padding_mask([2, 2], CPU).tolist() == [[1, 1], [1, 1]]
