"""How a tensor of the model lies across the shards, and how one group's rows become whole.

Learned once, at load, by comparing the local shape of every hook point with its full one. Only
rows that a live program reads are gathered, over a communicator of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import torch
import torch.distributed as dist

from ndif_actor.engine.hookpoints import Site
from ndif_actor.engine.moments import Moment
from ndif_actor.errors import ModelError
from ndif_client.wire.graph import HookPoint

#: torch 2.13 has renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


#: How a tensor's values are weighted in its marks, and how far those of equal ones may differ,
#: relative to its norm.
_FREQUENCIES = (0.0, 1.0, 1.7320508, 2.2360680)
_TOLERANCE = 0.02


class Seen(Protocol):
    """A tensor, or what was noted of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


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


class Glimpse(msgspec.Struct, frozen=True):
    """What one rank notes of a tensor.

    Attributes:
        shape: on this rank.
        marks: `[marks]` float64, which other values would change; its last one is the norm.
    """

    shape: tuple[int, ...]
    marks: torch.Tensor | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor, *, marked: bool) -> Glimpse:
        """Take note of a tensor's shape, and of its values if it is to be `marked`."""
        if not marked:
            return cls(tuple(tensor.shape))
        values = tensor.detach().reshape(-1).double().nan_to_num(0, 0, 0)
        places = torch.arange(values.numel(), dtype=torch.float64, device=values.device)
        waves = torch.outer(places.new_tensor(_FREQUENCIES), places).cos()
        return cls(tuple(tensor.shape), torch.cat([waves @ values, values.norm()[None]]))


class Layouts(NamedTuple):
    """How tensors lie across the ranks, and which can't be told; all ranks agree on it."""

    sharded: dict[HookPoint, Sharded]
    withheld: dict[HookPoint, str]


def learn_layouts(
    sites: Iterable[Site],
    recording: Mapping[Moment, Mapping[str, Seen]],
    tokens: int,
    factors: dict[str, int],
    group: ShardGroup,
) -> Layouts:
    """Compare what a forward of this shard showed with the full shapes.

    What an operation inside of a forward shows is trusted less than what a module does: it may be
    a part of a sum that the ranks have not added up yet, or lie in another way than a slice. Such
    sites are withheld.

    Args:
        sites: the hook points, with their full packed shapes.
        recording: what a packed forward of `tokens` tokens showed on this rank; glimpses, of
            operations.
        factors: fused parts in the outputs of modules sharded packed, by path.
        group: the shards to exchange sizes with.

    Raises:
        ModelError: what a module shows differs from its full shape in more than one axis.
    """
    sites = list(sites)
    squares = [site.point for site in sites if site.square]
    sites = [site for site in sites if site.packed_shape is not None]
    withheld = _unequal(sites, recording, group)
    found: list[tuple[HookPoint, int, int, int]] = []
    for site in sites:
        point, inside = site.point, bool(site.point.operation)
        local = recording.get(Moment.of(point), {}).get(point.leaf)
        if local is None:
            if inside:
                withheld[point] = "the loaded model does not run it"
            continue
        full = tuple(tokens if size == "T" else size for size in site.packed_shape or ())
        shape = tuple(local.shape)
        axes = [a for a, pair in enumerate(zip(shape, full, strict=False)) if len({*pair}) > 1]
        if len(axes) > 1 or len(shape) != len(full):
            if not inside:
                raise ModelError(f"{point} is sharded on several axes: {shape} of {full}")
            withheld[point] = f"it is no slice of the whole tensor here: {shape} of {full}"
        elif axes:
            found.append((point, axes[0] - len(shape), shape[axes[0]], int(full[axes[0]])))
            withheld.pop(point, None)  # that slices are not equal is what they are for
    sizes = group.sizes_of([size for _, _, size, _ in found])
    sharded = {}
    for i, (point, axis, _, width) in enumerate(found):
        slices = tuple(rank[i] for rank in sizes)
        if point.operation and (sum(slices) != width or _holds(point.path, factors)):
            withheld[point] = "how the shards' parts of it make up the whole can't be told"
        else:
            parts = 1 if point.operation else factors.get(point.path, 1)
            sharded[point] = Sharded(axis, slices, parts)
    for point in squares:
        # Scores and patterns have the heads of the queries, and no packed row to be seen in.
        queries = sharded.get(msgspec.structs.replace(point, port="query"))
        if queries is not None:
            sharded[point] = queries
    return Layouts(sharded, withheld)


def _unequal(
    sites: Sequence[Site], recording: Mapping[Moment, Mapping[str, Seen]], group: ShardGroup
) -> dict[HookPoint, str]:
    """Return the operations whose values differ between the ranks."""
    points = [site.point for site in sites if site.point.operation]
    seen = [recording.get(Moment.of(point), {}).get(point.leaf) for point in points]
    marks = [one.marks if isinstance(one, Glimpse) else None for one in seen]
    some = next((one for one in marks if one is not None), None)
    if group.world_size == 1 or some is None:
        return {}
    mine = torch.stack([torch.zeros_like(some) if one is None else one for one in marks])
    ranks = group.gather(mine[None], Sharded(-3, (1,) * group.world_size))
    spread = (ranks.amax(0) - ranks.amin(0)).amax(-1)
    differ = spread > _TOLERANCE * ranks[..., -1].amax(0)
    why = "each shard has a part of it that the model adds up later; read that sum instead"
    return {point: why for point, no in zip(points, differ.tolist(), strict=True) if no}


def _holds(path: str, factors: Mapping[str, int]) -> bool:
    """Whether one of the modules below `path` has a fused output."""
    return any(not path or below.startswith(f"{path}.") for below in factors)


def _interleave(slices: list[torch.Tensor], parts: int) -> torch.Tensor:
    if parts == 1:
        return torch.cat(slices)
    chunks = [piece.chunk(parts) for piece in slices]
    return torch.cat([chunk[part] for part in range(parts) for chunk in chunks])


def _collective_device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
