"""The arguments of an operation: matched with the catalogue, and brought to their wire form."""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ndif_client.errors import graph_error
from ndif_client.recorder import Recorder, current_recorder
from ndif_client.sources import capture
from ndif_client.values import Delegate, Value, node_of
from ndif_client.wire.catalogue import Op
from ndif_client.wire.graph import (
    MAX_ARGUMENTS,
    MAX_TEXT,
    Argument,
    Dots,
    Dtype,
    Items,
    Ref,
    Slice,
)
from ndif_client.wire.tensors import ITEM_BYTES, is_array

#: Parameters that torch also takes as several arguments: `x.view(1, -1)`.
_SPREAD = {
    "block_diag": 0, "broadcast_to": 1, "einsum": 1, "expand": 1, "flip": 1, "meshgrid": 0,
    "new_ones": 1, "new_zeros": 1, "ones": 0, "permute": 1, "rand": 0, "randn": 0, "repeat": 1,
    "reshape": 1, "tile": 1, "view": 1, "zeros": 0,
}  # fmt: skip

#: Those that torch also lets say `unbiased`, by name or after what they go over.
_SPREADS = frozenset(("std", "std_mean", "var", "var_mean"))

#: numpy's words that torch takes too.
_OTHER_WORDS = {"axis": "dim", "keepdims": "keepdim"}

_PYTHON_DTYPES: dict[Any, str] = {bool: "bool", int: "int64", float: "float64"}


def recorder_of(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Recorder:
    """Return the recorder of the first value among the arguments, or of the open trace."""
    for argument in _flat([*args, *kwargs.values()]):
        if isinstance(argument, Value):
            return argument._recorder
    return current_recorder(f"{op}(...)")


def bind(
    op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Match arguments with an operation's parameters; leading ones become positional.

    Raises:
        GraphError: too many, or a name the operation does not have.
    """
    positional = list(args)
    named = {_OTHER_WORDS.get(name, name): value for name, value in kwargs.items()}
    known = [name for name in op.parameters if name != "*"]
    most = op.parameters.index("*") if "*" in op.parameters else len(known)
    if op.name in _SPREAD:
        positional = _gather(positional, _SPREAD[op.name])
    if op.name in _SPREADS:
        positional = _without_unbiased(positional, named)
    _drop_where(named)
    while len(positional) < most and known[len(positional)] in named:
        positional.append(named.pop(known[len(positional)]))
    if len(positional) > most:
        raise graph_error(f"{op.name} takes at most {most} arguments by position: {usage(op)}")
    for name in list(named):
        if name in known[: len(positional)]:
            raise graph_error(f"{op.name} got {name!r} twice: {usage(op)}")
        if name not in known:
            raise graph_error(f"{op.name} has no argument {name!r} here: {usage(op)}")
    return positional, named


def _without_unbiased(positional: list[Any], named: dict[str, Any]) -> list[Any]:
    """Say `unbiased` as today's torch does, by `correction`."""
    place = next((i for i, value in enumerate(positional) if i and isinstance(value, bool)), None)
    if place is not None and place < 3:
        named["correction"] = int(positional[place])
        if len(positional) > place + 1:
            named["keepdim"] = positional[place + 1]
        return positional[:place]
    if "unbiased" in named:
        named["correction"] = int(named.pop("unbiased"))
    return positional


def _drop_where(named: dict[str, Any]) -> None:
    """Drop what torch's functions take about memory and history, where it changes no number."""
    named.pop("device", None)
    for name in ("requires_grad", "pin_memory"):
        if named.get(name) is False:
            del named[name]


def usage(op: Op) -> str:
    """Return how an operation is called, such as "softmax(input, dim, dtype)"."""
    return f"{op.name}({', '.join(op.parameters)})"


def signature(op: Op) -> inspect.Signature:
    """Return an operation's signature, for help texts and completion."""
    star = op.parameters.index("*") if "*" in op.parameters else len(op.parameters)
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD
                if position < star
                else inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if position == 0 else None,
            )
            for position, name in enumerate(op.parameters)
            if name != "*"
        ]
    )


def encode_call(
    op: Op, args: Sequence[Any], kwargs: Mapping[str, Any], recorder: Recorder
) -> tuple[list[Argument], dict[str, Argument]]:
    """Bring bound arguments to their wire form; constants among them are recorded.

    Raises:
        GraphError: one can't be part of a graph.
    """

    def one(name: str, value: Any) -> Argument:
        if name == "dtype" and isinstance(value, str):
            return Dtype(dtype_name(value))  # type: ignore[arg-type]
        return encode(value, recorder)

    return (
        [one(name, value) for name, value in zip(op.parameters, args, strict=False)],
        {name: one(name, value) for name, value in kwargs.items()},
    )


def encode(value: Any, recorder: Recorder) -> Argument:
    """Bring one argument to its wire form.

    Raises:
        GraphError: it can't be part of a graph, or belongs to another trace.
    """
    if isinstance(value, Delegate):
        value = value._sole_value()
    if isinstance(value, Value):
        if value._fields is not None:
            offered = ", ".join(value._fields) or "its items"
            raise graph_error(f"this value is a tuple of tensors; use one of them ({offered})")
        node = node_of(value, recorder)
        return Ref(recorder.detached(node) if recorder.is_without_gradients() else node)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):  # numpy's are floats too, and can't be sent
        return float(value)
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise graph_error(f"a text of {len(value)} characters; the limit is {MAX_TEXT}")
        return value
    if isinstance(value, list | tuple | range):
        if len(value) > MAX_ARGUMENTS:
            raise graph_error(
                f"a list of {len(value)} items; the limit is {MAX_ARGUMENTS}. Make it an array"
            )
        return Items([encode(item, recorder) for item in value])
    return _encode_other(value, recorder)


def encode_index(index: Any, recorder: Recorder, shape: Callable[[], Sequence[int]]) -> Argument:
    """Bring what stands between the brackets to its wire form.

    Args:
        index: as it was given.
        recorder: of the trace.
        shape: returns that of what is indexed, if it is needed.

    Raises:
        GraphError: it can't be an index.
    """
    parts = index if isinstance(index, tuple) else (index,)
    if any(map(_is_mask, parts)):
        parts = _with_places(parts, shape())
        return Items([_subscript(part, recorder) for part in parts])
    if isinstance(index, tuple):
        return Items([_subscript(part, recorder) for part in parts])
    return _subscript(index, recorder)


def _is_mask(part: Any) -> bool:
    if isinstance(part, list):
        return bool(part) and all(isinstance(item, bool) for item in part)
    return is_array(part) and str(part.dtype).removeprefix("torch.") == "bool"


def _with_places(parts: Sequence[Any], shape: Sequence[int]) -> tuple[Any, ...]:
    """Say by their places what masks of this machine choose: how many these are is known here."""
    masks = [np.asarray(part) if _is_mask(part) else None for part in parts]
    taken = sum(
        mask.ndim if mask is not None else part is not None and part is not ...
        for part, mask in zip(parts, masks, strict=True)
    )
    found: list[Any] = []
    axis = 0
    for part, mask in zip(parts, masks, strict=True):
        if mask is None:
            found.append(part)
            axis += len(shape) - taken if part is ... else part is not None
            continue
        own = list(shape[axis : axis + mask.ndim])
        if not mask.ndim or list(mask.shape) != own:
            raise graph_error(f"a mask of {list(mask.shape)} for dimensions of {own}")
        found += [np.ascontiguousarray(places) for places in mask.nonzero()]
        axis += mask.ndim
    return tuple(found)


def is_basic(index: Any) -> bool:
    """Whether torch would give a view for this index, not a copy."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(
        part is None
        or part is ...
        or isinstance(part, slice)
        or (isinstance(part, int | np.integer) and not isinstance(part, bool))
        for part in parts
    )


def encode_content(value: Any, recorder: Recorder) -> Argument:
    """Bring what is written into a tensor to its wire form; lists of numbers become tensors."""
    if isinstance(value, list | tuple) and not any(
        isinstance(item, Value | Delegate) or is_array(item) for item in _flat(value)
    ):
        return recorder.constant(_number_array(value))
    return encode(value, recorder)


def dtype_name(value: Any) -> str:
    """Return the wire name of a torch or numpy dtype, a Python type or a name.

    Raises:
        GraphError: it is no dtype that can be sent.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.dtype):
        name = str(value).removeprefix("torch.")
    elif isinstance(value, str):
        name = value.removeprefix("torch.")
    elif value in _PYTHON_DTYPES:
        name = _PYTHON_DTYPES[value]
    else:
        name = np.dtype(value).name
    if name not in ITEM_BYTES:
        raise graph_error(f"dtype {name!r} is not one of {', '.join(ITEM_BYTES)}")
    return name


def is_dtype(value: Any) -> bool:
    """Whether `value` is a dtype of torch or numpy, its name, or a Python type that means one."""
    if isinstance(value, str):
        return value.removeprefix("torch.") in ITEM_BYTES
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.dtype):
        return True
    return isinstance(value, np.dtype) or (
        isinstance(value, type) and (value in _PYTHON_DTYPES or issubclass(value, np.generic))
    )


def _subscript(part: Any, recorder: Recorder) -> Argument:
    if isinstance(part, slice):
        return Slice(*(_bound(bound) for bound in (part.start, part.stop, part.step)))
    if part is ...:
        return Dots()
    if isinstance(part, list | range):
        if any(isinstance(item, Value | Delegate) for item in _flat(part)):
            raise graph_error(
                "a list of values of the trace can't be an index; join them with ops.stack([...])"
            )
        return recorder.constant(_number_array(part, np.int64))
    if isinstance(part, float | str):
        raise graph_error(f"{part!r} can't be an index of a tensor")
    return encode(part, recorder)


def _bound(bound: Any) -> int | None:
    if bound is None:
        return None
    if isinstance(bound, Value | Delegate) or not hasattr(bound, "__index__"):
        raise graph_error(
            f"the bounds of a slice are known numbers, not {type(bound).__name__}; "
            "take slices with gather or index_select where the place is itself a value"
        )
    return _integer(operator.index(bound))


def _integer(value: int) -> int:
    if not -(1 << 63) <= value < 1 << 63:
        raise graph_error(f"{value} does not fit into 64 bits")
    return int(value)


def _number_array(values: Any, empty: Any = np.float32) -> np.ndarray[Any, Any]:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise graph_error(f"this list is no array: {error}") from None
    if array.dtype.kind not in "biuf":
        raise graph_error(f"a list of {array.dtype} can't be part of a graph")
    if array.size == 0:
        return array.astype(empty)
    # Python's floats are torch's default float.
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _encode_other(value: Any, recorder: Recorder) -> Argument:
    if isinstance(value, slice) or value is ...:
        return _subscript(value, recorder)
    if is_dtype(value):
        return Dtype(dtype_name(value))  # type: ignore[arg-type]
    if isinstance(value, np.generic) and not isinstance(value, np.complexfloating):
        return encode(value.item(), recorder)
    if is_array(value):
        try:
            if getattr(value, "requires_grad", False):
                recorder.local_gradients.append(capture())
                recorder.warn_of_local_gradients()
            return recorder.constant(value)
        except TypeError as error:
            raise graph_error(str(error)) from None
    hint = "; did you mean its .output?" if hasattr(type(value), "output") else ""
    raise graph_error(
        f"{type(value).__name__} can't be part of a graph{hint}; numbers, texts, dtypes, slices, "
        "arrays, tensors and values of this trace can"
    )


def _gather(args: list[Any], start: int) -> list[Any]:
    """Join what torch takes as several arguments into the one list of the catalogue."""
    rest = args[start:]
    if not rest or (len(rest) == 1 and isinstance(rest[0], list | tuple)):
        return args
    return [*args[:start], tuple(rest)]


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        elif isinstance(value, Delegate):
            yield value._sole_value()
        else:
            yield value
