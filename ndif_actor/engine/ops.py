"""The one callable behind each name of the catalogue, and the checks made before it runs.

The same callables infer shapes on meta tensors at admission and compute on the shard. Nothing
outside this table is ever called for a user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ndif_actor.engine import random_operations
from ndif_actor.engine.low_rank import low_rank
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
    if op.name == "setitem" and _is_mask(index):
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
    parts = _subscripts(index)
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


def _subscripts(index: Any) -> tuple[Any, ...]:
    """Return an index as a tuple of subscripts; a list of numbers in it becomes an index tensor."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(part) if isinstance(part, tuple) else part for part in parts)


def _getitem(input: Any, index: Any) -> Any:
    if isinstance(input, tuple):
        if not isinstance(index, int | slice):
            raise TypeError("a tuple of tensors is indexed by one number or slice")
        return input[index]
    return input[_subscripts(index)]


def _setitem(input: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    if _is_mask(index):
        return _masked(input, index, value)
    changed = input.clone()
    changed[_subscripts(index)] = value
    return changed


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


def _masked(input: torch.Tensor, mask: torch.Tensor, value: Any) -> torch.Tensor:
    """Return `input` with `value` wherever the mask over its first dimensions is true."""
    if mask.shape != input.shape[: mask.dim()]:
        raise IndexError(f"a mask of shape {list(mask.shape)} for a value of {list(input.shape)}")
    rest = input.dim() - mask.dim()
    if not isinstance(value, torch.Tensor):
        return input.masked_fill(mask.reshape(*mask.shape, *[1] * rest), value)
    if value.dim() > rest:
        raise IndexError(
            "what is written where a mask is true has the same value there, as how often it is "
            "true depends on values; use where(mask, a, b)"
        )
    return torch.where(mask.reshape(*mask.shape, *[1] * rest), value.to(input.dtype), input)


def _type_as(input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return input.to(other.dtype)


def _reshape_as(input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return input.reshape(other.shape)


def _unfold(input: torch.Tensor, dimension: int, size: int, step: int) -> torch.Tensor:
    return input.unfold(dimension, size, step)


def _to(input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return input.to(dtype)


def _view(input: torch.Tensor, shape: Any) -> torch.Tensor:
    return input.reshape(shape)


def _expand(input: torch.Tensor, shape: Any) -> torch.Tensor:
    return input.expand(shape)


def _repeat(input: torch.Tensor, repeats: Any) -> torch.Tensor:
    return input.repeat(repeats)


def _div(input: torch.Tensor, other: Any, rounding_mode: str | None = None) -> torch.Tensor:
    if rounding_mode == "trunc" and not torch.result_type(input, other).is_floating_point:
        # The smallest integer divided by -1 overflows, which ends the process.
        minus_one = torch.as_tensor(other) == -1
        divisor = torch.where(minus_one, 1, other)
        return torch.where(minus_one, -input, torch.div(input, divisor, rounding_mode="trunc"))
    return torch.div(input, other, rounding_mode=rounding_mode)


def _sort(
    input: torch.Tensor, dim: int = -1, descending: bool = False, stable: bool = False
) -> Any:
    return torch.sort(input, dim=dim, descending=descending, stable=stable)


def _argsort(
    input: torch.Tensor, dim: int = -1, descending: bool = False, stable: bool = False
) -> torch.Tensor:
    return torch.argsort(input, dim=dim, descending=descending, stable=stable)


def _einsum(equation: str, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.einsum(equation, *operands)


_SPECIAL: dict[str, Callable[..., Any]] = {
    "getitem": _getitem,
    "setitem": _setitem,
    "to": _to,
    "view": _view,
    "expand": _expand,
    "repeat": _repeat,
    "div": _div,
    "sort": _sort,
    "argsort": _argsort,
    "einsum": _einsum,
    "entr": torch.special.entr,
    "low_rank": low_rank,
    "reshape_as": _reshape_as,
    "type_as": _type_as,
    "unfold": _unfold,
}

_CREATION = frozenset(("zeros", "ones", "full", "arange", "linspace", "eye"))

_HOMES: dict[str, Any] = {
    "torch": torch,
    "functional": torch.nn.functional,
    "linalg": torch.linalg,
}


def _callable(op: Op) -> Callable[..., Any]:
    if op.home == "special":
        return _SPECIAL[op.name]
    found: Callable[..., Any] = getattr(_HOMES[op.home], op.torch_name or op.name)
    return found


_CALLABLES: dict[str, Callable[..., Any]] = {
    op.name: _callable(op) for op in CATALOGUE.values() if op.home != "random"
}
