"""Proxies: what a trace's values look like in Python. Using one records; nothing is computed.

Operators and the catalogue's methods are put on the class by `operators`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ndif_client.arguments import (
    bind,
    dtype_name,
    encode_call,
    encode_content,
    encode_index,
    is_basic,
    is_dtype,
    recorder_of,
)
from ndif_client.errors import (
    NdifError,
    NoValueError,
    UnknownNameError,
    ValueUnknownError,
    graph_error,
)
from ndif_client.facts import facts_of
from ndif_client.gradients import (
    BackwardBlock,
    differentiate,
    read_gradient,
    unused_part,
    write_gradient,
)
from ndif_client.method_types import MethodTypes
from ndif_client.recorder import Recorder
from ndif_client.sized import ASKED, Sized
from ndif_client.values import (
    MAY_COPY,
    VIEW_OPS,
    Delegate,
    Hooked,
    Origin,
    Value,
    View,
    change,
    is_dense,
    is_turned,
    known_dtype,
    node_of,
)
from ndif_client.wire.catalogue import ALIASES, CATALOGUE, Op
from ndif_client.wire.graph import Apply, Dots, Dtype, Items, Ref
from ndif_client.wire.tensors import is_array

if TYPE_CHECKING:
    from ndif_client.held import Handle

#: Devices by torch's names: what is said of them is passed over.
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d+)?$")

#: What Python may ask of a tensor but not of a value that is still to be computed.
_UNKNOWN = {
    "__bool__": "whether it is true; use ops.where(condition, a, b) in the place of `if`, `and`, "
    "`or` (and & | ~ for masks)",
    "__contains__": "what it contains; use (value == x).any()",
    "__float__": "its number; leave out float(...), or save it and use .value after the trace",
    "__int__": "its number; leave out int(...), or save it and use .value after the trace",
    "__complex__": "its number; save it and use .value after the trace",
    "__index__": "its number; a value can index a value: h[:, position]",
    "__array__": "its numbers; use the catalogue's operations (ndif_client.ops) on it, or save it "
    "and use .value after the trace",
    "item": "its number; save it and use .value.item() after the trace",
    "tolist": "its numbers; save it and use .value.tolist() after the trace",
    "numpy": "its numbers; save it and use .value.numpy() after the trace",
}


#: What torch's tensors have for which there is another way here.
_ELSEWHERE = {
    "register_hook": "inside of `with loss.backward():`, read and assign .grad",
    "masked_select": "how much it selects depends on values; use where(mask, a, b)",
    "nonzero": "how many there are depends on values; use topk, argmax, or where(mask, a, b)",
    "unique": "how many there are depends on values; save the value, and use .value.unique()",
    "apply_": "a function of this machine can't run on the server; use the catalogue's operations",
    "map_": "a function of this machine can't run on the server; use the catalogue's operations",
    "eig": "use eigh, of a symmetric matrix; or save it and use .value",
    "eigvals": "use eigvalsh, of a symmetric matrix; or save it and use .value",
}


#: Stands for the node of the value that a view is made of.
_OWN = Ref(0)


class Proxy(Sized, MethodTypes):
    """A value of the model, or computed from one, that exists on the server when the trace runs."""

    __slots__ = ("_saved",)

    def __init__(
        self,
        recorder: Recorder,
        node: int,
        origin: Origin = None,
        fields: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(recorder, node, origin, fields)
        #: number of the node that saves it
        self._saved: int | None = None

    def save(self, name: str | None = None) -> Proxy:
        """Have the value sent back, as it is at this point of the program.

        Args:
            name: what the result calls it; by default the name of the variable that holds it.

        Returns:
            The proxy itself; when the trace has run, its `value` is a tensor.
        """
        number = self._recorder.save(node_of(self))
        if name is not None:
            self._recorder.name(name, number)
        self._saved = number
        return self

    def keep(self, name: str | None = None) -> Handle:
        """Have the value stay on the server, for later traces of this session.

        Args:
            name: `session.held(name)` finds it again; what was held as that before is replaced. By
                default it has none, and stays as long as the handle does.

        Returns:
            What stands for it in later traces; it is there when this one has ended well. Of a value
            that a generation makes at several steps, that is the last one made.

        Raises:
            GraphError: it is made in an edit or in some cases only, or another is kept as that.
        """
        holder = self._recorder.holder
        assert holder is not None, "every session has one"
        return holder.keep(self, name)

    @property
    def value(self) -> Any:
        """The saved value, when the trace has run: a tensor, or a tuple of tensors.

        Raises:
            NoValueError: it was not saved, or the trace has not run, or has failed before.
        """
        recorder = self._recorder
        if self._saved is None:
            at = recorder.source_of(self._node)
            raise NoValueError(
                f"this value was not saved; call .save() on it inside of the trace\n  at {at}"
            )
        failure = recorder.failure
        if failure is not None:
            if isinstance(failure, NdifError) and failure.result is not None:
                return failure.result.saved(self._saved)
            raise NoValueError(
                f"there is no value, because the trace has failed: {failure}"
            ) from failure
        if recorder.result is None:
            raise NoValueError(
                "there is no value yet: the trace has not run. It runs at the end of "
                "`async with session.trace(...)`, or at `await trace` after a plain `with`"
            )
        return recorder.result.saved(self._saved)

    # ------------------------------------------------------------ gradients

    def backward(
        self,
        gradient: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> BackwardBlock:
        """Differentiate this value; after that, `.grad` of a value is its gradient.

        Args:
            gradient: what to begin with, of this value's shape; without it the value is one number.
            retain_graph: means nothing here: a trace may have any number of backwards.
            create_graph: gradients of gradients are not offered.
            inputs: means nothing here: whose gradients are found follows from whose are used.

        Returns:
            A block: inside of `with loss.backward():`, `.grad` means the gradients of this
            backward; outside, those of the last one that was recorded.

        Raises:
            GraphError: it can't be differentiated here.
        """
        if create_graph:
            raise graph_error("backward(create_graph=True): gradients of gradients are not offered")
        return differentiate(self, gradient)

    @property
    def grad(self) -> Proxy:
        """The gradient of this value in the last backward, of its shape and dtype.

        Assigning replaces it, and the gradients of what the value was made from follow from that.
        Of a part that nothing was computed with, `h[:, -1]`, it is that part of the gradient.
        """
        part = unused_part(self)
        if part is not None:
            whole = part.parent.grad  # type: ignore[attr-defined]
            apply = Apply("getitem", [Ref(node_of(whole)), *part.apply.args[1:]])
            view = View(whole, apply, whole._version)
            return Proxy(self._recorder, self._recorder.add(apply), view)
        number, origin = read_gradient(self)
        return Proxy(self._recorder, number, origin)

    @grad.setter
    def grad(self, gradient: Any) -> None:
        if unused_part(self) is not None:
            fill(self.grad, gradient)
        else:
            write_gradient(self, gradient)

    @property
    def requires_grad(self) -> bool:
        """Whether it may have a gradient: any float may."""
        return self.is_floating_point()

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        """Do nothing, as `requires_grad_` does."""

    def requires_grad_(self, requires_grad: bool = True) -> Proxy:
        """Return the value itself: what has a gradient follows from whose `.grad` is used."""
        return self

    def retain_grad(self) -> None:
        """Do nothing: the gradient of any value can be had."""

    # ------------------------------------------------------------ indexing

    def __getitem__(self, index: Any) -> Proxy:
        if self._fields is not None:
            return self._item(index)
        encoded = encode_index(index, self._recorder, lambda: self.shape)
        apply = Apply("getitem", [Ref(node_of(self)), encoded])
        origin = View(self, apply, self._version) if is_basic(index) else None
        return Proxy(self._recorder, self._recorder.add(apply), origin)

    def __setitem__(self, index: Any, value: Any) -> None:
        if self._fields is not None:
            raise graph_error("the items of a tuple of tensors can't be replaced")
        recorder = self._recorder
        encoded = encode_index(index, recorder, lambda: self.shape)
        if _is_own_view(value, self, encoded):
            return  # `h[i] += v` has changed h already
        content = encode_content(value, recorder)
        change(self, recorder.add(Apply("setitem", [Ref(node_of(self)), encoded, content])))

    def _item(self, index: Any) -> Proxy:
        assert self._fields is not None
        if not isinstance(index, int) or isinstance(index, bool):
            raise graph_error(f"a tuple of tensors is indexed by one number, not {index!r}")
        if self._fields and not -len(self._fields) <= index < len(self._fields):
            raise graph_error(f"item {index} of a tuple of {len(self._fields)} tensors")
        apply = Apply("getitem", [Ref(node_of(self)), index])
        looks_at = isinstance(self._origin, View)
        origin = View(self, apply, self._version) if looks_at else None
        return Proxy(self._recorder, self._recorder.add(apply), origin)

    def __iter__(self) -> Iterator[Proxy]:
        if self._fields is not None and not self._fields:
            self._fields = tuple(map(str, range(len(facts_of(self).items or ()))))
        if self._fields is not None:
            return (self._item(index) for index in range(len(self._fields)))
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        if self._fields:
            return len(self._fields)
        if self._fields is not None:
            return len(facts_of(self).items or ())
        shape = self.shape
        if not shape:
            raise _unknown(self, "__float__")
        return int(shape[0])

    @property
    def data(self) -> Proxy:
        """The value without its gradient history."""
        return apply_op("detach", (self,), {})

    # ------------------------------------------------------------ dtypes and devices

    def to(self, *args: Any, **kwargs: Any) -> Proxy:
        """Return the value in another dtype; devices mean nothing here and are passed over."""
        given = (*args, *kwargs.values())
        for value in given:
            if isinstance(value, str) and not is_dtype(value) and not _DEVICE.match(value):
                raise graph_error(f"to({value!r}): that is neither a dtype nor a device")
        wanted = [value for value in given if is_dtype(value)]
        if not wanted:
            like = next((v for v in given if isinstance(v, Value | Delegate) or is_array(v)), None)
            return self if like is None else apply_op("type_as", (self, like), {})
        dtype, own = dtype_name(wanted[0]), known_dtype(self)
        if dtype == own:
            return self  # as in torch, a change of it changes this value
        if own is not None:
            return apply_op("to", (self, dtype), {})
        cast = Apply("to", [_OWN, Dtype(dtype)])  # type: ignore[arg-type]
        return _perhaps_a_view(self, cast)

    type = to

    def cpu(self) -> Proxy:
        """Return the value itself: results always arrive on the CPU."""
        return self

    def cuda(self, *_: Any) -> Proxy:
        """Return the value itself: where it is computed is the server's choice."""
        return self

    def contiguous(self) -> Proxy:
        """Return the value; if it is changed in place, what it looks at may be meant or not."""
        if not isinstance(self._origin, View):
            return self
        if is_dense(self):
            return self
        if is_turned(self):
            return apply_op("clone", (self,), {})
        return _perhaps_a_view(self, Apply("clone", [_OWN]))

    def where(self, condition: Any, other: Any) -> Proxy:
        """Return this value where `condition`, else `other`."""
        return apply_op("where", (condition, self, other), {})

    @property
    def T(self) -> Proxy:
        """The transpose of a matrix."""
        return apply_op("permute", (self, (1, 0)), {})

    @property
    def mT(self) -> Proxy:
        """The value with its last two dimensions swapped."""
        return apply_op("transpose", (self, -2, -1), {})

    # ------------------------------------------------------------ the rest of Python

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            if name in ASKED:  # a refusal of the property is an AttributeError, and led here
                return vars(Sized)[name].__get__(self)
            if self._fields and name in self._fields:
                return self._item(self._fields.index(name))
            raise _no_attribute(self, name)

    def __hash__(self) -> int:
        return id(self)

    def __dir__(self) -> list[str]:
        fields = [name for name in self._fields or () if name.isidentifier()]
        return [*super().__dir__(), *fields]

    def __repr__(self) -> str:
        recorder = self._recorder
        if self._saved is not None and recorder.result is not None:
            try:
                return f"Proxy(value={recorder.result.saved(self._saved)!r})"
            except NoValueError as absent:
                return f"Proxy({absent})"
        place = f"{self._origin.hook}, " if isinstance(self._origin, Hooked) else ""
        return f"Proxy({place}{recorder.source_of(self._node)})"

    def __format__(self, spec: str) -> str:
        try:
            return format(repr(self), spec)
        except ValueError:
            raise _unknown(self, "__float__") from None

    def __copy__(self) -> Proxy:
        return self  # a copy of a tensor shares its memory

    def __deepcopy__(self, memo: dict[int, Any]) -> Proxy:
        return apply_op("clone", (self,), {})


def _perhaps_a_view(value: Proxy, apply: Apply) -> Proxy:
    """Record an operation that in torch is a view or a copy, as only the server knows."""
    recorder = value._recorder
    apply = Apply(apply.op, [Ref(node_of(value)), *apply.args[1:]])
    view = View(value, apply, value._version, certain=False)
    return Proxy(recorder, recorder.add(apply), view)


def apply_op(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Proxy:
    """Record an operation of the catalogue and return its result.

    Args:
        name: its name there.
        args, kwargs: as torch takes them: values, numbers, arrays, tensors, lists.

    Raises:
        GraphError: arguments that it does not take.
    """
    op = CATALOGUE[name]
    bound, named = bind(op, args, kwargs)
    if name in ("max", "min") and len(bound) > 1 and _is_tensor(bound[1]):
        return apply_op(f"{name}imum", bound[:2], {})
    recorder = recorder_of(name, bound, named)
    encoded, encoded_named = encode_call(op, bound, named, recorder)
    apply = Apply(name, encoded, encoded_named)
    fields = _fields(op, encoded, encoded_named)
    origin = None
    if name in VIEW_OPS:
        first = bound[0]._sole_value() if isinstance(bound[0], Delegate) else bound[0]
        if isinstance(first, Value):
            certain = name not in MAY_COPY or is_dense(first)
            origin = View(first, apply, first._version, certain=certain)
    return Proxy(recorder, recorder.add(apply), origin, fields)


def change_op(name: str, value: Proxy, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Proxy:
    """Record an operation that changes its first argument in place, as `h += v` does."""
    changed = apply_op(name, (value, *args), kwargs)
    if any(not isinstance(argument, int | float) for argument in (*args, *kwargs.values())):
        # As in torch, a value changed in place keeps its shape and dtype.
        filled = Apply("setitem", [Ref(node_of(value)), Dots(), Ref(node_of(changed))])
        change(value, value._recorder.add(filled))
    else:
        change(value, node_of(changed))
    return value


def fill(value: Proxy, content: Any) -> Proxy:
    """Record that all of `value` is replaced in place by `content`."""
    recorder = value._recorder
    encoded = encode_content(content, recorder)
    change(value, recorder.add(Apply("setitem", [Ref(node_of(value)), Dots(), encoded])))
    return value


def _is_own_view(value: Any, parent: Proxy, index: Any) -> bool:
    if not isinstance(value, Proxy) or not isinstance(value._origin, View):
        return False
    view = value._origin
    return (
        view.parent is parent
        and view.apply.op == "getitem"
        and view.apply.args[1] == index
        and view.seen == parent._version
    )


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument, Value | Delegate) or is_array(argument)


def _fields(op: Op, args: list[Any], kwargs: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the names of an operation's results where there are several."""
    if op.fields:
        single = op.name in ("max", "min", "median") and len(args) < 2 and "dim" not in kwargs
        return None if single else op.fields
    if op.name == "chunk" and len(args) > 1 and isinstance(args[1], int):
        return tuple(map(str, range(args[1])))
    if op.name == "split" and len(args) > 1 and isinstance(args[1], Items):
        return tuple(map(str, range(len(args[1].values))))
    if op.name == "tensor_split" and len(args) > 1 and not isinstance(args[1], Ref):
        pieces = len(args[1].values) + 1 if isinstance(args[1], Items) else args[1]
        return tuple(map(str, range(pieces)))
    if op.name == "meshgrid" and isinstance(args[0], Items):
        return tuple(map(str, range(len(args[0].values))))
    return () if op.name in ("chunk", "split", "tensor_split", "unbind") else None


def _unknown(value: Value, asked: str) -> ValueUnknownError:
    error = graph_error(
        f"this value is computed later, on the server, so nobody knows yet {_UNKNOWN[asked]}",
        ValueUnknownError,
    )
    assert isinstance(error, ValueUnknownError)
    return error


def _no_attribute(value: Value, name: str) -> Exception:
    if name in _UNKNOWN:
        return _unknown(value, name)
    if name in CATALOGUE or name in ALIASES:
        message = f"{name!r} is no method of a value here; use ops.{name}(...), or torch's function"
        return graph_error(message, UnknownNameError)
    if name in _ELSEWHERE:
        return graph_error(f"{name!r} is not offered: {_ELSEWHERE[name]}", UnknownNameError)
    offered = [*CATALOGUE, *ALIASES, *(value._fields or ())]
    near = difflib.get_close_matches(name, offered, n=1)
    hint = f"; did you mean .{near[0]}(...)?" if near else "; dir(ndif_client.ops) lists what is"
    return graph_error(f"{name!r} is not in the catalogue of operations{hint}", UnknownNameError)
