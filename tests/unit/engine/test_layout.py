"""How a tensor is cut into slices, and how the slices of all ranks become whole again.

That they travel is proven with real processes in tests/integration/engine.
"""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ndif_actor.engine import layout
from ndif_actor.engine.hookpoints import Site
from ndif_actor.engine.layout import Glimpse, Sharded, ShardGroup, learn_layouts
from ndif_actor.engine.moments import Moment
from ndif_actor.errors import ModelError
from ndif_client.wire.graph import HookPoint


class Rank(ShardGroup):
    """One of several ranks, without a communicator; told what the other ranks' sizes are."""

    def __init__(self, rank: int, world_size: int, sizes: list[list[int]] | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.sizes = sizes

    def sizes_of(self, sizes: list[int]) -> list[list[int]]:
        assert self.sizes is not None
        assert sizes == self.sizes[self.rank]
        return self.sizes


@given(
    slices=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
    parts=st.integers(1, 3),
    axis=st.sampled_from([-1, -2, -3]),
)
def test_the_slices_of_all_ranks_are_the_whole(slices: list[int], parts: int, axis: int) -> None:
    sharded = Sharded(axis, tuple(size * parts for size in slices), parts)
    shape = [2, 3, 4]
    shape[axis] = sum(sharded.sizes)
    whole = torch.arange(2 * 3 * 4 * sum(sharded.sizes)).float()
    whole = whole[: torch.Size(shape).numel()].view(shape)

    pieces = [Rank(rank, len(slices)).slice(whole, sharded) for rank in range(len(slices))]

    assert [piece.shape[axis] for piece in pieces] == list(sharded.sizes)
    along = [piece.movedim(axis, 0) for piece in pieces]
    assert torch.equal(layout._interleave(along, parts).movedim(0, axis), whole)


def test_of_a_fused_tensor_each_rank_has_a_slice_of_each_part() -> None:
    gate_and_up = torch.tensor([10, 11, 12, 13, 20, 21, 22, 23])
    sharded = Sharded(-1, (4, 4), parts=2)

    assert Rank(0, 2).slice(gate_and_up, sharded).tolist() == [10, 11, 20, 21]
    assert Rank(1, 2).slice(gate_and_up, sharded).tolist() == [12, 13, 22, 23]


# ---------------------------------------------------------------- learning


def site(path: str, packed_shape: tuple[int | str, ...] | None) -> Site:
    return Site(
        point=HookPoint(path, "output"),
        order=0,
        shape=("batch", "sequence"),
        dtype=torch.float32,
        batch_axis=0,
        token_axis=1,
        packed_shape=packed_shape,
    )


def seen(**shapes: tuple[int, ...]) -> dict[Moment, dict[str, torch.Tensor]]:
    return {Moment(p, "output", 0): {"": torch.zeros(shape)} for p, shape in shapes.items()}


SITES = [
    site("norm", (1, "T", 8)),
    site("q_proj", (1, "T", 8)),
    site("q_norm", (1, "T", 4, 2)),
    site("gate_up", (1, "T", 14)),
    site("unseen", (1, "T", 8)),
    site("mask", None),
]


def test_a_tensor_is_sharded_on_the_axis_in_which_it_differs_from_its_full_shape() -> None:
    recording = seen(
        norm=(1, 6, 8), q_proj=(1, 6, 4), q_norm=(1, 6, 2, 2), gate_up=(1, 6, 8), mask=(3, 3)
    )
    group = Rank(0, 2, sizes=[[4, 2, 8], [4, 2, 6]])

    found = learn_layouts(SITES, recording, 6, {"gate_up": 2}, group)

    assert found.withheld == {}
    assert found.sharded == {
        HookPoint("q_proj", "output"): Sharded(-1, (4, 4)),
        HookPoint("q_norm", "output"): Sharded(-2, (2, 2)),
        HookPoint("gate_up", "output"): Sharded(-1, (8, 6), parts=2),
    }


def test_a_tensor_cut_along_several_axes_is_refused() -> None:
    with pytest.raises(ModelError, match="is sharded on several axes"):
        learn_layouts(SITES, seen(q_norm=(1, 6, 2, 1)), 6, {}, Rank(0, 2, [[]]))


# ---------------------------------------------------------------- inside of a forward


class Ranks(Rank):
    """The first of two ranks, which is told what the other one's marks are."""

    def __init__(self, sizes: list[list[int]], other: list[torch.Tensor]) -> None:
        super().__init__(0, 2, sizes)
        self.other = torch.stack([Glimpse.of(value, marked=True).marks for value in other])

    def gather(self, local: torch.Tensor, layout: Sharded) -> torch.Tensor:
        return torch.cat([local, self.other[None]])


def inside(operation: str, packed_shape: tuple[int | str, ...]) -> Site:
    point = HookPoint("mlp", "output", operation=operation)
    return msgspec.structs.replace(site("mlp", packed_shape), point=point)


def glimpsed(**values: torch.Tensor) -> dict[Moment, dict[str, Glimpse]]:
    return {
        Moment("mlp", "output", 0, name): {"": Glimpse.of(value, marked=True)}
        for name, value in values.items()
    }


def test_what_the_ranks_have_yet_to_add_up_is_withheld() -> None:
    generator = torch.Generator().manual_seed(0)
    same, mine, others = torch.randn(3, 1, 6, 8, generator=generator)
    sites = [inside("same_0", (1, "T", 8)), inside("part_0", (1, "T", 8))]
    recording = glimpsed(same_0=same, part_0=mine)

    sharded, withheld = learn_layouts(sites, recording, 6, {}, Ranks([[], []], [same, others]))

    assert sharded == {}
    assert list(withheld) == [sites[1].point]
    assert "adds up later" in withheld[sites[1].point]


def test_slices_of_an_operation_are_learned_and_what_is_none_is_withheld() -> None:
    generator = torch.Generator().manual_seed(0)
    values = {
        "heads_0": torch.randn(1, 6, 2, 4, generator=generator),
        "both_0": torch.randn(1, 6, 2, 2, generator=generator),
        "short_0": torch.randn(1, 6, 3, 4, generator=generator),
        "flat_0": torch.randn(6, 16, generator=generator),
    }
    sites = [inside(name, (1, "T", 4, 4)) for name in (*values, "unseen_0")]
    others = [-value for value in values.values()] + [torch.zeros(1)]
    group = Ranks([[2, 3], [2, 2]], others)

    sharded, withheld = learn_layouts(sites, glimpsed(**values), 6, {}, group)

    points = {one.point.operation: one.point for one in sites}
    assert sharded == {points["heads_0"]: Sharded(-2, (2, 2))}
    assert withheld.keys() == {points[name] for name in ("both_0", "short_0", "flat_0", "unseen_0")}
    assert withheld[points["unseen_0"]] == "the loaded model does not run it"


def test_slices_beside_a_fused_projection_are_withheld() -> None:
    sites = [inside("chunk_0", (1, "T", 8))]
    value = torch.ones(1, 6, 4)
    group = Ranks([[4], [4]], [value])

    sharded, withheld = learn_layouts(
        sites, glimpsed(chunk_0=value), 6, {"mlp.gate_up_proj": 2}, group
    )

    assert sharded == {}
    assert "can't be told" in withheld[sites[0].point]


def test_a_model_in_one_piece_has_no_sharded_tensors() -> None:
    recording = seen(norm=(1, 6, 8), q_proj=(1, 6, 8))

    assert learn_layouts(SITES, recording, 6, {}, ShardGroup(0, 1)) == ({}, {})
