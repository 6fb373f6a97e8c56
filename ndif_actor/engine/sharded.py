"""This rank's shard of a model, seen as if it were whole.

Hook points, module calls and parameters show full tensors; what lies in slices across the ranks is
gathered on the way out and sliced on the way in. Every gather follows from the graph alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ndif_actor.engine import leaves, ops, shapes
from ndif_actor.engine.layout import Sharded, ShardGroup
from ndif_actor.errors import ReplicaLost
from ndif_client.wire.graph import HookPoint

_T = TypeVar("_T")


class ShardedModel:
    """A model and how its tensors lie across the ranks."""

    def __init__(
        self,
        model: PreTrainedModel,
        group: ShardGroup,
        layouts: Mapping[HookPoint, Sharded],
        partial: frozenset[HookPoint],
        device: torch.device,
        flows: Callable[[], Collection[HookPoint]] = frozenset,
    ) -> None:
        self.model = model
        self.device = device
        self._group = group
        self._layouts = layouts
        self._partial = partial
        self._flows = flows

    @property
    def is_sharded(self) -> bool:
        return self._group.world_size > 1

    def whole(self, point: HookPoint, local: torch.Tensor) -> torch.Tensor:
        """Return the full value of which `local` is this rank's share."""
        layout = self._layouts.get(point)
        if layout is None:
            return local
        return _together(lambda: self._group.gather(local, layout))

    def flows(self, point: HookPoint) -> bool:
        """Whether autograd follows by itself the tensor that enters a module."""
        return point in self._flows()

    def check_gradient(self, point: HookPoint) -> None:
        """Refuse a gradient that no rank has whole.

        Raises:
            ValueError: such is that of this hook point.
        """
        if point in self._partial:
            raise ValueError(
                "its gradient is not offered where the model lies in several shards, because each "
                "has a part of it only"
            )

    def slice(self, point: HookPoint, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's share of a full value."""
        layout = self._layouts.get(point)
        return whole if layout is None else self._group.slice(whole, layout)

    def agreed(self, values: torch.Tensor) -> torch.Tensor:
        """Return rank 0's values, so that no rank goes another way for a rounding of its own."""
        return _together(lambda: self._group.broadcast(values)) if self.is_sharded else values

    def call(self, path: str, args: list[Any], kwargs: dict[str, Any]) -> ops.Value:
        """Apply a module to full values and return its full output.

        Raises:
            IndexError: an embedding is asked for a row it does not have.
        """
        module = shapes.submodule(self.model, path)
        if not self._holds_shards(module):
            # Watching every operation costs a sixth of a large matrix product.
            looks_up = any(not t.is_floating_point() for _, t in leaves.walk((args, kwargs)))
            with ops.BoundedLookups() if looks_up else nullcontext():
                return _output(module(*args, **kwargs))
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        args, kwargs = list(bound.args[1:]), bound.kwargs
        if args and (layout := self._layouts.get(HookPoint(path, "input", "args.0"))):
            args = [self._group.slice(args[0], layout), *args[1:]]
        output = _together(lambda: _output(module(*args, **kwargs)))
        if isinstance(output, tuple):
            return output
        return self.whole(HookPoint(path, "output"), output)

    def parameter(self, path: str) -> torch.Tensor:
        """Return a whole parameter or buffer."""
        value = shapes.parameter(self.model, path)
        if isinstance(value, DTensor):
            sharded: DTensor = value
            # Redistributing a DTensor fails inside of inference mode.
            with torch.inference_mode(False), torch.no_grad():
                return _together(sharded.full_tensor)
        return value.detach()

    def _holds_shards(self, module: torch.nn.Module) -> bool:
        return self.is_sharded and any(isinstance(p, DTensor) for p in module.parameters())


def _output(output: Any) -> ops.Value:
    if isinstance(output, torch.Tensor):
        return output
    return tuple(item for item in output if isinstance(item, torch.Tensor))


def _together(collective: Callable[[], _T]) -> _T:
    """Run something that all ranks run together; if it breaks, the replica is lost.

    gloo reports a dead peer as a bare RuntimeError, which must not pass for a user's mistake.
    """
    try:
        return collective()
    except RuntimeError as error:
        raise ReplicaLost(f"the shards lost each other: {error}") from error
