"""The one callable behind each name of the catalogue, and the checks made before it runs.

The same callables infer shapes on meta tensors at admission and compute on the shard. Nothing
outside this table is ever called for a user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ndif_actor.engine import random_operations, special_operations
from ndif_client.wire.catalogue import CATALOGUE, Op
from ndif_client.wire.graph import Argument, Dots, Dtype, Items, Ref, Slice

Value = torch.Tensor | tuple[torch.Tensor, ...]

#: What torch raises for arguments it does not take; anything else is a mistake of ours.
REFUSALS = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
)


def resolve(argument: Argument, values: Callable[[int], Any]) -> Any:
    """Turn a graph's argument into a Python one; `values(n)` gives the value of node n."""
    match argument:
        case Ref(node=node):
            return values(node)
        case Slice(start=start, stop=stop, step=step):
            return slice(start, stop, step)
        case Dots():
            return ...
        case Dtype(name=name):
            return getattr(torch, name)
        case Items(values=items):
            return tuple(resolve(item, values) for item in items)
        case _:
            return argument


def apply(
    op: Op,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Value:
    """Run an operation of the catalogue.

    Args:
        op: the entry.
        args, kwargs: resolved arguments, named and ordered as in the entry.
        device: where tensors made from nothing (`zeros`, `arange`) are put.
        generator: of random operations, on the CPU; without one they draw from a fresh one.

    Raises:
        IndexError: an index lies outside of what it indexes.
        Exception: whatever torch raises for these arguments.
    """
    if op.bounded_index is not None:
        check_bounds(op, args, kwargs)
    if op.home == "random":
        fresh = torch.Generator().manual_seed(0) if generator is None else generator
        return random_operations.CALLABLES[op.name](fresh, device, *args, **kwargs)
    if op.name in _CREATION:
        kwargs = {**kwargs, "device": device}
    result = _CALLABLES[op.name](*args, **kwargs)
    if isinstance(result, torch.Tensor):
        return result
    return tuple(result)


def bind(op: Op, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Check the number and names of arguments.

    Raises:
        TypeError: too many, or a name the operation does not have.
    """
    names = [name for name in op.parameters if name != "*"]
    positional = op.parameters.index("*") if "*" in op.parameters else len(names)
    if len(args) > positional:
        raise TypeError(
            f"{op.name} takes at most {positional} arguments by position, not {len(args)}"
        )
    for name in kwargs:
        if name not in names:
            raise TypeError(f"{op.name} has no argument {name!r}; it has {', '.join(names)}")
        if name in names[: len(args)]:
            raise TypeError(f"{op.name} got {name!r} twice")


def argument(op: Op, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return the argument of that name, wherever it was given, or None."""
    position = op.parameters.index(name)
    return args[position] if position < len(args) else kwargs.get(name)


#: Those whose indices are classes, one of which may be ignored.
_CLASSES = frozenset(("cross_entropy", "nll_loss"))


# ---------------------------------------------------------------- checks before a kernel starts


def check_bounds(op: Op, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Check index tensors on the host: on a device, a bad index would kill everybody's process."""
    assert op.bounded_index is not None
    index = argument(op, op.parameters[op.bounded_index], args, kwargs)
    if op.name == "setitem" and special_operations.is_mask(index):
        return
    if op.name in ("getitem", "setitem"):
        _check_subscripts(argument(op, "input", args, kwargs), index)
    elif isinstance(index, torch.Tensor):
        if op.name in _CLASSES:
            index = index.where(index != kwargs.get("ignore_index", -100), 0)
        check_range(index, *_limits(op, args, kwargs), op.name)


def _limits(op: Op, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, int]:
    if op.name == "embedding":
        return 0, argument(op, "weight", args, kwargs).shape[0]
    if op.name == "one_hot":
        classes = argument(op, "num_classes", args, kwargs)
        if classes is None or classes < 1:
            raise ValueError("one_hot needs num_classes, a number above 0")
        return 0, classes
    source = argument(op, "input", args, kwargs)
    if op.name == "take":
        return -source.numel(), source.numel()
    if op.name == "bincount":
        return 0, special_operations.bins(argument(op, "minlength", args, kwargs))
    if op.name in _CLASSES:
        return 0, source.shape[-1 if source.dim() == 1 else 1]
    dim = argument(op, "dim", args, kwargs)
    if dim is None:
        return 0, source.numel()
    return 0, source.shape[dim] if source.dim() else 1


def _check_subscripts(value: Any, index: Any) -> None:
    if not isinstance(value, torch.Tensor):
        return
    axis = 0
    parts = special_operations.subscripts(index)
    consumed = sum(p is not None and p is not ... for p in parts)
    for part in parts:
        if part is None:
            continue
        if part is ...:
            axis += value.dim() - consumed
            continue
        if isinstance(part, torch.Tensor):
            if part.dtype == torch.bool:
                raise IndexError(
                    "a boolean mask as index gives a result whose size depends on values; use "
                    "where(mask, a, b), masked_fill, or a mask that you know as indices, "
                    "mask.nonzero()[:, 0]"
                )
            if axis < value.dim():
                size = value.shape[axis]
                check_range(part, -size, size, f"index of dimension {axis}")
        axis += 1


def check_range(index: torch.Tensor, low: int, high: int, what: str) -> None:
    """Check that all values of an index tensor lie in `[low, high)`.

    Raises:
        IndexError: one does not; `what` says where.
    """
    if index.is_meta or index.numel() == 0 or index.is_floating_point():
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(index))
    if smallest < low or largest >= high:
        worst = smallest if smallest < low else largest
        raise IndexError(f"{what}: index {worst} is out of range [{low}, {high})")


class BoundedLookups(TorchDispatchMode):
    """Within the block, embeddings check the ids they are asked for before they look them up."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.embedding.default:
            check_range(args[1], 0, args[0].shape[0], "embedding")
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------- the table

_CREATION = frozenset(
    ("zeros", "ones", "full", "arange", "linspace", "eye", "tril_indices", "triu_indices")
)

_HOMES: dict[str, Any] = {
    "torch": torch,
    "functional": torch.nn.functional,
    "linalg": torch.linalg,
    "fft": torch.fft,
}


def _callable(op: Op) -> Callable[..., Any]:
    if op.home == "special":
        return special_operations.CALLABLES[op.name]
    found: Callable[..., Any] = getattr(_HOMES[op.home], op.torch_name or op.name)
    return found


_CALLABLES: dict[str, Callable[..., Any]] = {
    op.name: _callable(op) for op in CATALOGUE.values() if op.home != "random"
}
