"""Python's operators, torch's functions and the catalogue's methods, on proxies."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ndif_client.arguments import signature
from ndif_client.errors import UnknownNameError, graph_error
from ndif_client.proxy import Proxy, _unknown, apply_op, change_op, fill
from ndif_client.wire.catalogue import ALIASES, CATALOGUE, Op

Method = Callable[..., Any]

#: Python's name of an operator -> the catalogue's.
_BINARY = {
    "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "floordiv": "floor_divide",
    "mod": "remainder", "pow": "pow", "matmul": "matmul", "and": "bitwise_and",
    "or": "bitwise_or", "xor": "bitwise_xor",
}  # fmt: skip

_COMMUTATIVE = frozenset(("add", "mul", "bitwise_and", "bitwise_or", "bitwise_xor"))

_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")

_UNARY = {"neg": "neg", "abs": "abs", "invert": "bitwise_not", "ceil": "ceil", "floor": "floor",
          "trunc": "trunc"}  # fmt: skip

#: `x.float()` and its like.
_CASTS = {
    "bfloat16": "bfloat16", "bool": "bool", "double": "float64", "float": "float32",
    "half": "float16", "int": "int32", "long": "int64",
}  # fmt: skip

#: Operations that torch also offers in place, as `x.clamp_(min=0)`.
_IN_PLACE = frozenset(
    (
        "abs", "acos", "add", "addcdiv", "addcmul", "asin", "atan", "atan2", "ceil", "clamp",
        "clamp_max", "clamp_min", "cos", "cosh", "cumprod", "cumsum", "div", "erf", "erfc", "exp",
        "exp2", "expm1", "floor", "floor_divide", "frac", "hypot", "index_add", "index_copy",
        "index_fill", "lerp", "log", "log10", "log1p", "log2", "masked_fill", "mul",
        "nan_to_num", "neg", "pow", "reciprocal", "relu", "remainder", "round", "rsqrt", "scatter",
        "scatter_add", "sigmoid", "sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh",
        "tril", "triu", "trunc", "xlogy",
    )
)  # fmt: skip

#: Functions of torch.linalg that the catalogue has under other names.
_LINALG = {"cross": "linalg_cross", "diagonal": "linalg_diagonal", "matmul": "matmul",
           "matrix_exp": "matrix_exp", "norm": "linalg_norm"}  # fmt: skip

#: Operations of torch.linalg that torch itself offers too, and means the same by.
_SAME_IN_TORCH = frozenset(("det", "logdet", "matrix_power", "slogdet"))

_UNANSWERABLE = ("__bool__", "__contains__", "__float__", "__int__", "__complex__", "__index__",
                 "__array__")  # fmt: skip


def operator_names() -> list[str]:
    """Return the special methods that make Python's operators work on a proxy."""
    binary = [f"__{way}{name}__" for name in _BINARY for way in ("", "r", "i")]
    binary.remove("__imatmul__")
    unary = [f"__{name}__" for name in (*_UNARY, *_COMPARISONS, "round", "pos")]
    return [*binary, *unary, *_UNANSWERABLE]


def is_in_place(name: str) -> bool:
    """Whether a special method changes what stands on its left, as `+=` does."""
    plain = name.strip("_")
    return plain.startswith("i") and plain[1:] in _BINARY


def apply_any(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Proxy:
    """Record an operation by any of the names torch users know it by."""
    return apply_op(ALIASES.get(op, op), args, kwargs)


def torch_function(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Proxy:
    """Record what torch was asked to do with a proxy: `torch.softmax(proxy, -1)`.

    Raises:
        UnknownNameError: the catalogue does not have it.
        GraphError: it would change a tensor of the user's own machine.
    """
    name = getattr(function, "__name__", repr(function))
    own = bool(args) and isinstance(args[0], Proxy)
    if name.startswith("__") and name.endswith("__"):
        return _operator(name, args, own)
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place and not own:
        raise _local_change()
    if own and in_place and hasattr(Proxy, name):
        changed: Proxy = getattr(args[0], name)(*args[1:], **kwargs)
        return changed
    if function is getattr(sys.modules.get("torch.autograd"), "grad", None):
        found: Any = _autograd_grad(*args, **kwargs)
        return found  # type: ignore[no-any-return]
    if name == "svd":
        found = _svd(*args, **kwargs)
        return found  # type: ignore[no-any-return]
    op = _entry(name)
    if op is None:
        raise graph_error(
            f"torch's {name!r} is not in the catalogue of operations; dir(ndif_client.ops) lists "
            "what is",
            UnknownNameError,
        )
    named = _without_defaults(function, op, kwargs)
    if named.pop("inplace", False):  # as the layers of torch.nn have it
        if not own:
            raise _local_change()
        return change_op(op.name, args[0], args[1:], named)
    return apply_op(op.name, args, named)


def _autograd_grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> Any:
    """Record `torch.autograd.grad`: one backward, and the gradients of these values in it."""
    if is_grads_batched:
        raise graph_error("torch.autograd.grad(is_grads_batched=True): take one backward for each")
    losses = outputs if isinstance(outputs, tuple | list) else [outputs]
    starts = grad_outputs if isinstance(grad_outputs, tuple | list) else [grad_outputs]
    if len(losses) != 1:
        raise graph_error("torch.autograd.grad: differentiate one value, or the sum of several")
    several = isinstance(inputs, tuple | list)
    with losses[0].backward(starts[0], retain_graph, create_graph):
        return tuple(value.grad for value in (inputs if several else [inputs]))


class _Decomposed(NamedTuple):
    """What `torch.svd` returns."""

    U: Proxy
    S: Proxy
    V: Proxy


def _svd(input: Any, some: bool = True, compute_uv: bool = True) -> Any:
    """Record `torch.svd`: of the decomposition as torch.linalg has it, V is what Vh is turned."""
    left, values, right = apply_op("svd", (input,), {"full_matrices": not some})
    if not compute_uv:
        raise graph_error("torch.svd(compute_uv=False): take torch.linalg.svdvals")
    return _Decomposed(left, values, right.mT)


def _entry(name: str) -> Op | None:
    """Return the catalogue's operation that does what torch's function of that name does."""
    if name.startswith("linalg_"):
        name = name.removeprefix("linalg_")
        op = CATALOGUE.get(_LINALG.get(name, name))
        return op if op is not None and (op.home == "linalg" or name in _LINALG) else None
    op = CATALOGUE.get(ALIASES.get(name, name).removeprefix("special_"))
    is_other = op is not None and op.home == "linalg" and name not in (*ALIASES, *_SAME_IN_TORCH)
    return None if is_other else op


def _operator(name: str, args: tuple[Any, ...], own: bool) -> Proxy:
    if name == "__setitem__":
        raise _local_change()
    if name == "__getitem__" and not own:
        raise graph_error(
            "a tensor of this machine can't be indexed by a value of the trace; bring it in with "
            "ops.clone(tensor) and index that"
        )
    found: Proxy = getattr(Proxy, name)(*args) if own else _reflected(name, args)
    return found


def _reflected(name: str, args: tuple[Any, ...]) -> Proxy:
    """A tensor on the left, a proxy on the right."""
    plain = name.strip("_")
    if is_in_place(name):
        raise _local_change()
    op = _BINARY.get(plain) or (plain if plain in _COMPARISONS else None)
    if op is None:
        raise graph_error(f"{name} of a tensor and a value of the trace is not offered")
    return apply_op(op, args, {})


def _local_change() -> Exception:
    return graph_error(
        "a tensor of this machine can't be changed by a value of the trace, which exists only on "
        "the server; make a value of it first: ops.clone(tensor)"
    )


def _without_defaults(function: Any, op: Op, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the arguments that torch's own wrappers add and the catalogue does not know."""
    kept = {name: value for name, value in kwargs.items() if not name.startswith("_")}
    extra = [name for name in kept if name not in op.parameters]
    if extra:
        try:
            known = inspect.signature(function).parameters
        except (TypeError, ValueError):  # a builtin without a signature
            known = {}  # type: ignore[assignment]
        for name in extra:
            default = known[name].default if name in known else None
            # What means something is kept, so that it is followed or refused: False is not always
            # what an argument is by default.
            simple = isinstance(default, bool | int | float | str)
            same = simple and type(kept[name]) is type(default) and kept[name] == default
            if kept[name] is None or same:
                del kept[name]
    return kept


# ---------------------------------------------------------------- what is put on the class


def _method(op: Op) -> Method:
    def method(self: Proxy, *args: Any, **kwargs: Any) -> Proxy:
        return apply_op(op.name, (self, *args), kwargs)

    return method


def _in_place(op: Op) -> Method:
    def method(self: Proxy, *args: Any, **kwargs: Any) -> Proxy:
        return change_op(op.name, self, args, kwargs)

    return method


def _binary(op: str) -> Method:
    return lambda self, other: apply_op(op, (self, other), {})


def _reverse(op: str) -> Method:
    return lambda self, other: apply_op(op, (other, self), {})


def _augmented(op: str) -> Method:
    return lambda self, other: change_op(op, self, (other,), {})


def _unary(op: str) -> Method:
    return lambda self: apply_op(op, (self,), {})


def _cast(dtype: str) -> Method:
    return lambda self: self.to(dtype)


def _unanswerable(asked: str) -> Method:
    def method(self: Proxy, *_: Any, **__: Any) -> Any:
        raise _unknown(self, asked)

    return method


def _divided(self: Proxy, other: Any) -> Proxy:
    """`1 / h` as torch does it, for numbers; tensors on the left divide as they are."""
    if isinstance(other, int | float):
        return apply_op("mul", (apply_op("reciprocal", (self,), {}), other), {})
    return apply_op("div", (other, self), {})


def _zero(self: Proxy) -> Proxy:
    return fill(self, 0)


def _fill() -> Method:
    def method(self: Proxy, value: Any) -> Proxy:
        return fill(self, value)

    return method


def _round(self: Proxy, digits: int = 0) -> Proxy:
    return apply_op("round", (self,), {"decimals": digits} if digits else {})


def _install(name: str, method: Method, op: Op | None = None) -> None:
    if name in vars(Proxy):
        return
    method.__name__ = name
    method.__qualname__ = f"Proxy.{name}"
    if op is not None:
        method.__doc__ = op.doc
        method.__signature__ = signature(op)  # type: ignore[attr-defined]
    setattr(Proxy, name, method)


def _install_all() -> None:
    # First of all, because numbers on the left of these need torch's own detours.
    _install("__rtruediv__", _divided)
    _install("__rsub__", _binary("rsub"))
    for name, op in _BINARY.items():
        _install(f"__{name}__", _binary(op))
        _install(f"__r{name}__", (_binary if op in _COMMUTATIVE else _reverse)(op))
        if name != "matmul":
            _install(f"__i{name}__", _augmented(op))
    for name in _COMPARISONS:
        setattr(Proxy, f"__{name}__", _binary(name))
    for name, op in _UNARY.items():
        _install(f"__{name}__", _unary(op))
    for name, dtype in _CASTS.items():
        _install(name, _cast(dtype))
    for name in _UNANSWERABLE:
        _install(name, _unanswerable(name))
    _install("__round__", _round)
    _install("__pos__", lambda self: self)
    methods = {name: op for name, op in CATALOGUE.items() if op.method}
    methods.update({name: CATALOGUE[target] for name, target in ALIASES.items()})
    for name, entry in methods.items():
        if entry.method:
            _install(name, _method(entry), entry)
        if entry.name in _IN_PLACE:
            _install(f"{name}_", _in_place(entry), entry)
    _install("zero_", _zero)
    _install("fill_", _fill())
    _install("copy_", _fill())
    _install("svd", _svd)


#: numpy's functions of elements -> the catalogue's, where the names differ.
_UFUNCS = {
    "equal": "eq", "invert": "bitwise_not", "power": "pow", "rint": "round", "mod": "remainder",
}  # fmt: skip


def _array_ufunc(self: Proxy, function: Any, method: str, *args: Any, **kwargs: Any) -> Proxy:
    """Record what numpy was asked to do with a proxy: `array - proxy`, `np.sqrt(proxy)`."""
    if any(isinstance(out, np.ndarray) for out in kwargs.get("out", ())):
        raise _local_change()
    name = _UFUNCS.get(function.__name__, function.__name__)
    name = ALIASES.get(name, name)
    if method != "__call__" or kwargs or name not in CATALOGUE:
        raise graph_error(
            f"numpy's {function.__name__!r} can't be applied to a value of the trace; "
            "dir(ndif_client.ops) lists what can",
            UnknownNameError,
        )
    return apply_op(name, args, {})


def _array_function(
    self: Proxy, function: Any, types: Any, args: Any, kwargs: Mapping[str, Any]
) -> Proxy:
    raise graph_error(
        f"numpy's {function.__name__!r} can't be applied to a value of the trace, as numpy and "
        "torch differ in details; use a method of the value, or ndif_client.ops",
        UnknownNameError,
    )


def _torch_function(
    cls: type[Proxy], function: Any, types: Any, args: Any = (), kwargs: Any = None
) -> Proxy:
    return torch_function(function, args, kwargs or {})


Proxy.__torch_function__ = classmethod(_torch_function)  # type: ignore[attr-defined]
Proxy.__array_ufunc__ = _array_ufunc  # type: ignore[attr-defined]
Proxy.__array_function__ = _array_function  # type: ignore[attr-defined]
_install_all()
