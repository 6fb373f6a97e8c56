"""How a tensor of the model lies across the shards, and how one group's rows become whole.

Learned once, at load, by comparing the local shape of every hook point with its full one. Only
rows that a live program reads are gathered, over a communicator of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from ndif_actor.engine.hookpoints import Site
from ndif_actor.engine.moments import Moment
from ndif_actor.errors import ModelError
from ndif_client.wire.graph import HookPoint

#: torch 2.13 has renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Sharded(msgspec.Struct, frozen=True):
    """A tensor whose `axis` is divided among the ranks.

    Attributes:
        axis: negative, so that it holds with and without leading axes.
        sizes: of each rank's slice.
        parts: how many tensors are fused along the axis, each divided by itself.
    """

    axis: int
    sizes: tuple[int, ...]
    parts: int = 1


class ShardGroup:
    """This rank among the shards of its replica, and the communicator for gathering rows."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        # Not the model's own: a gather must never queue behind or between its collectives.
        self._group = dist.new_group() if world_size > 1 else None

    def gather(self, local: torch.Tensor, layout: Sharded) -> torch.Tensor:
        """Return the whole of a tensor of which `local` is this rank's slice.

        Differentiable, for a loss that all ranks compute from the same whole values.
        """
        if torch.is_grad_enabled() and local.requires_grad:
            whole: torch.Tensor = _Gather.apply(local, self, layout)
            return whole
        return self._gather(local, layout)

    def _gather(self, local: torch.Tensor, layout: Sharded) -> torch.Tensor:
        axis = local.dim() + layout.axis
        largest = max(layout.sizes)
        mine = local.movedim(axis, 0).contiguous()
        if mine.shape[0] < largest:
            mine = torch.cat([mine, mine.new_zeros(largest - mine.shape[0], *mine.shape[1:])])
        gathered = mine.new_empty(self.world_size, *mine.shape)
        _all_gather(gathered.view(-1, *mine.shape[1:]), mine, group=self._group)
        slices = [gathered[rank, :size] for rank, size in enumerate(layout.sizes)]
        return _interleave(slices, layout.parts).movedim(0, axis)

    def slice(self, whole: torch.Tensor, layout: Sharded) -> torch.Tensor:
        """Return this rank's slice of a whole tensor; differentiable, as `gather` is."""
        if torch.is_grad_enabled() and whole.requires_grad:
            mine: torch.Tensor = _Slice.apply(whole, self, layout)
            return mine
        return self._slice(whole, layout)

    def _slice(self, whole: torch.Tensor, layout: Sharded) -> torch.Tensor:
        axis = whole.dim() + layout.axis
        pieces = []
        for part in whole.chunk(layout.parts, axis):
            start = sum(layout.sizes[: self.rank]) // layout.parts
            pieces.append(part.narrow(axis, start, layout.sizes[self.rank] // layout.parts))
        return torch.cat(pieces, axis) if layout.parts > 1 else pieces[0]

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """Return rank 0's values; all ranks have as many."""
        values = values.contiguous()
        dist.broadcast(values, group_src=0, group=self._group)
        return values

    def sizes_of(self, sizes: list[int]) -> list[list[int]]:
        """Exchange a list of numbers; return every rank's."""
        if self.world_size == 1:
            return [sizes]
        device = _collective_device()
        mine = torch.tensor(sizes, dtype=torch.int64, device=device)
        gathered = torch.empty(self.world_size * len(sizes), dtype=torch.int64, device=device)
        _all_gather(gathered, mine, group=self._group)
        return [list(map(int, row)) for row in gathered.view(self.world_size, -1).tolist()]


class _Gather(torch.autograd.Function):
    """Each rank has the gradient of the whole; its own slice of that is its share."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: ShardGroup, layout: Sharded) -> torch.Tensor:
        ctx.group, ctx.layout = group, layout
        return group._gather(local, layout)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.group._slice(gradient, ctx.layout), None, None


class _Slice(torch.autograd.Function):
    """Each rank has the gradient of its slice; the whole one is all of them."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, group: ShardGroup, layout: Sharded) -> torch.Tensor:
        ctx.group, ctx.layout = group, layout
        return group._slice(whole, layout).clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.group._gather(gradient, ctx.layout), None, None


def learn_layouts(
    sites: Iterable[Site],
    recording: dict[Moment, dict[str, torch.Tensor]],
    tokens: int,
    factors: dict[str, int],
    group: ShardGroup,
) -> dict[HookPoint, Sharded]:
    """Compare what a forward of this shard showed with the full shapes.

    Args:
        sites: the hook points, with their full packed shapes.
        recording: what a packed forward of `tokens` tokens showed on this rank.
        factors: fused parts in the outputs of modules sharded packed, by path.
        group: the shards to exchange sizes with.

    Raises:
        ModelError: a tensor differs from its full shape in more than one axis.
    """
    found: list[tuple[HookPoint, int, int]] = []
    sites = list(sites)
    for site in sites:
        local = recording.get(_moment(site.point), {}).get(site.point.leaf)
        if local is None or site.packed_shape is None:
            continue
        full = tuple(tokens if size == "T" else size for size in site.packed_shape)
        axes = [a for a, pair in enumerate(zip(local.shape, full, strict=True)) if len({*pair}) > 1]
        if len(axes) > 1:
            raise ModelError(f"{site.point} is sharded on several axes: {local.shape} of {full}")
        if axes:
            found.append((site.point, axes[0] - local.dim(), local.shape[axes[0]]))
    sizes = group.sizes_of([size for _, _, size in found])
    layouts = {
        point: Sharded(axis, tuple(rank[i] for rank in sizes), factors.get(point.path, 1))
        for i, (point, axis, _) in enumerate(found)
    }
    for site in sites:
        # Scores and patterns have the heads of the queries, and no packed row to be seen in.
        queries = layouts.get(msgspec.structs.replace(site.point, port="query"))
        if site.square and queries is not None:
            layouts[site.point] = queries
    return layouts


def _moment(point: HookPoint) -> Moment:
    return Moment(point.path, point.port, point.call)


def _interleave(slices: list[torch.Tensor], parts: int) -> torch.Tensor:
    if parts == 1:
        return torch.cat(slices)
    chunks = [piece.chunk(parts) for piece in slices]
    return torch.cat([chunk[part] for part in range(parts) for chunk in chunks])


def _collective_device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
