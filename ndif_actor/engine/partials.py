"""Where a gradient is not the same on all shards, though the value is.

A tensor that every rank holds whole, and that each rank's own heads or neurons use, gets on each
rank only their part of its gradient, unless transformers adds the parts up, as it does where
modules are entered and left. Rotary embeddings are such: found by one backward at load, and
refused rather than shown in part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from ndif_actor.engine import adapter, leaves, operations
from ndif_actor.engine.attention import attending
from ndif_actor.engine.batch import pack_prompts
from ndif_actor.engine.layout import Sharded, ShardGroup
from ndif_actor.engine.moments import Moment
from ndif_client.wire.graph import HookPoint, Port

#: Of a prompt of different tokens: among equal ones, attention has no gradient to speak of.
_TOKENS = 6

_RELATIVE = 1e-3


def partial_gradients(
    model: torch.nn.Module,
    points: Iterable[HookPoint],
    layouts: dict[HookPoint, Sharded],
    group: ShardGroup,
    vocab_size: int,
    device: torch.device,
) -> frozenset[HookPoint]:
    """Return the hook points with whole values whose gradients differ among the ranks.

    All ranks call it together.
    """
    seen: dict[HookPoint, torch.Tensor] = {}
    ids = [(7 * n + 1) % vocab_size for n in range(_TOKENS)]
    batch = pack_prompts([ids], device)
    assert batch.packing is not None
    points = [point for point in points if point not in layouts]
    watching = _watching(model, set(points), seen)
    with torch.enable_grad(), attending(batch.packing.layouts[0]), watching:
        output = adapter.run_packed(model, batch.input_ids, batch.position_ids)  # type: ignore[arg-type]
        adapter.logits(output).float().sin().sum().backward()
    whole = [point for point in points if point in seen]
    sizes = torch.zeros(len(whole), 2, dtype=torch.float64, device=device)
    for row, point in enumerate(whole):
        gradient = seen[point].grad
        if gradient is not None:
            wide = gradient.double()
            sizes[row] = torch.stack([wide.norm(), wide.flatten()[:: 1 + wide.numel() // 7].sum()])
    every = group.gather(sizes[None], Sharded(-3, (1,) * group.world_size))
    apart = (every - every[:1]).abs().amax((0, 2)) > _RELATIVE * every.abs().amax((0, 2))
    return frozenset(point for point, differs in zip(whole, apart.tolist(), strict=True) if differs)


@contextmanager
def _watching(
    model: torch.nn.Module, points: Collection[HookPoint], into: dict[HookPoint, torch.Tensor]
) -> Iterator[None]:
    """Within the block, note what passes these points, to have its gradient."""
    calls: Counter[tuple[str, Port, str]] = Counter()

    @torch.enable_grad()  # the model computes some things without
    def watch(path: str, port: Port, structure: Any, operation: str = "") -> Any:
        moment = Moment(path, port, calls[path, port, operation], operation)
        calls[path, port, operation] += 1
        for leaf, tensor in list(leaves.walk(structure)):
            point = moment.point(leaf)
            if tensor.is_floating_point() and point in points:
                known = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
                mine = known.clone()
                mine.retain_grad()
                into[point] = mine
                structure = leaves.replace(structure, leaf, mine)
        return structure

    with ExitStack() as stack:
        for path, module in model.named_modules():
            for handle in _hooks(path, module, watch):
                stack.callback(handle.remove)
            if names := {p.operation for p in points if p.path == path and p.operation}:
                inside = partial(_inside, watch, path)
                stack.enter_context(operations.watching(module, inside, names))
        yield


def _hooks(
    path: str, module: torch.nn.Module, watch: Callable[[str, Port, Any], Any]
) -> Iterator[Any]:
    def before(_: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        changed = watch(path, "input", leaves.inputs(args, kwargs))
        return changed["args"], changed["kwargs"]

    yield module.register_forward_pre_hook(before, with_kwargs=True)
    yield module.register_forward_hook(lambda _, args, output: watch(path, "output", output))


def _inside(
    watch: Callable[[str, Port, Any, str], Any], path: str, operation: str, port: Port, value: Any
) -> Any:
    return watch(path, port, value, operation)
