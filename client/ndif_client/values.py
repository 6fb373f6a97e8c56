"""A value of the recorded program, and what changing it in place means.

Values on the wire never change, so an in-place change is recorded as a new value, and the Python
object stands for it from then on. As in torch, views see changes of what they look at and pass
their own on to it; a change that reaches a hook point is written there.

    h = layer.output        Hooked     h[0] = 0   ->  setitem, then a write of the hook point
    g = h[0]                View of h  g[:] = 0   ->  setitem on g, setitem on h, then the write
    d = h.grad              Gradient   d[0] = 0   ->  setitem, then a write of the gradient
    w = layer.weight        Owned      read-only
    s = h + 1               (neither)  s[0] = 0   ->  setitem
"""

from __future__ import annotations

from dataclasses import dataclass

from ndif_client.errors import ClosedTraceError, graph_error
from ndif_client.recorder import Recorder
from ndif_client.wire.graph import Apply, Argument, HookPoint, Items, Ref, Source
from ndif_client.wire.messages import HookInfo

#: Operations whose result shares memory with their first argument in torch.
VIEW_OPS = frozenset(
    (
        "broadcast_to", "chunk", "detach", "diagonal", "expand", "flatten", "getitem", "movedim",
        "expand_as", "linalg_diagonal", "narrow", "permute", "reshape", "reshape_as", "select",
        "split", "squeeze", "t", "tensor_split", "transpose", "unbind", "unflatten", "unfold",
        "unsqueeze", "view",
    )
)  # fmt: skip

#: Those that torch refuses where it would have to copy.
_NEVER_COPY = frozenset(("squeeze", "unflatten", "view"))

#: Those that copy where torch has to.
MAY_COPY = frozenset(("flatten", "reshape", "reshape_as"))


#: Those whose result lies in memory as what they look at.
_STAYS_DENSE = frozenset(("same", "detach", "squeeze", "unflatten", "unsqueeze", "view", *MAY_COPY))


#: "Operation" of a view of all of a value, and of an inverse that is the child itself.
SAME = "same"


@dataclass(slots=True)
class Hooked:
    """Where a value was read: changes of it are written there.

    Attributes:
        hook, info, invoke: the place.
        last_write: the write that this value has seen, if there was one.
    """

    hook: HookPoint
    info: HookInfo
    invoke: int
    last_write: int | None = None


@dataclass(slots=True)
class Gradient:
    """Whose gradient a value is: changes of it are written there.

    Attributes:
        backward: number of the node in the course of which it is known.
        of: number of the node whose gradient it is.
        last_write: the write that this value has seen, if there was one.
    """

    backward: int
    of: int
    last_write: int | None = None


@dataclass(slots=True)
class Owned:
    """The model's own parameter or buffer."""

    path: str


@dataclass(slots=True)
class View:
    """What a value looks at.

    Attributes:
        parent: the value it is a part or another shape of.
        apply: the operation that made it; its first argument stands for the parent.
        seen: the parent's version it was made from.
        certain: whether torch would give a view of it, not a copy, whatever the parent is.
    """

    parent: Value
    apply: Apply
    seen: int
    certain: bool = True


Origin = Hooked | Gradient | Owned | View | None


class Value:
    """A value of one trace: the node it stands for now, and where it comes from."""

    __slots__ = ("_fields", "_given", "_node", "_origin", "_recorder", "_stale", "_version")

    def __init__(
        self,
        recorder: Recorder,
        node: int,
        origin: Origin = None,
        fields: tuple[str, ...] | None = None,
    ) -> None:
        self._recorder = recorder
        self._node = node
        self._origin = origin
        #: names of its items where it is a tuple of tensors, () where nobody knows how many
        self._fields = fields
        self._version = 0
        #: the line that changed it through a view that can't be followed back
        self._stale: Source | None = None
        #: the line that wrote it to a hook point
        self._given: Source | None = None


class Delegate:
    """Something that stands for a value where one is needed, such as a module's output."""

    def _sole_value(self) -> Value:
        raise NotImplementedError


def node_of(value: Value, recorder: Recorder | None = None) -> int:
    """Return the node a value stands for now; a view of a changed value is made again.

    Args:
        value: the value.
        recorder: the trace it is wanted in, if not its own.

    Raises:
        ClosedTraceError: it belongs to another trace.
        GraphError: it was changed in a way that can't be followed.
    """
    own = value._recorder
    if recorder is not None and recorder is not own:
        raise graph_error(
            "a value of one trace is used in another; values don't outlive their trace. Save it, "
            "and use its .value, or put both prompts into one trace with trace.invoke(...)",
            ClosedTraceError,
            other=own.source_of(value._node),
        )
    if value._stale is not None:
        raise graph_error(
            "this value was changed through a reshaped view of it, which can't be followed; change "
            "it by indexing, or view a .clone()",
            other=value._stale,
        )
    origin = value._origin
    if isinstance(origin, View):
        parent = node_of(origin.parent)
        if origin.seen != origin.parent._version:
            if not origin.certain:
                raise graph_error(
                    f"what this was made from, by .{origin.apply.op}(...), was changed since; "
                    "whether this changed with it depends on how that lies in memory: make it "
                    "anew, or of a .clone()",
                    other=own.source_of(value._node),
                )
            # At the steps it was made for: those of the line that uses it now may be others.
            block = own.block_of(value._node)
            if origin.apply.op == SAME:
                replace_node(value, parent)
            else:
                replace_node(value, own.add(_with_input(origin.apply, parent), block=block))
            origin.seen = origin.parent._version
    return value._node


def is_dense(value: Value) -> bool:
    """Whether a value lies in memory without gaps, for all that is known here."""
    while isinstance(value._origin, View):
        if value._origin.apply.op not in _STAYS_DENSE:
            return False
        value = value._origin.parent
    return True


def is_turned(value: Value) -> bool:
    """Whether a value looks at another one with its dimensions in another order."""
    while isinstance(value._origin, View):
        if value._origin.apply.op in ("movedim", "permute", "t", "transpose"):
            return True
        value = value._origin.parent
    return False


def hooked_at(value: Value) -> HookPoint | None:
    """Return the hook point that a value was read at as a whole, if it was."""
    while isinstance(value._origin, View) and value._origin.apply.op == SAME:
        value = value._origin.parent
    return value._origin.hook if isinstance(value._origin, Hooked) else None


def known_dtype(value: Value) -> str | None:
    """Return the dtype of a value, if it is known here."""
    while isinstance(value._origin, View) and value._origin.apply.op in (*VIEW_OPS, SAME):
        value = value._origin.parent
    return value._origin.info.dtype if isinstance(value._origin, Hooked) else None


def change(value: Value, node: int) -> None:
    """Let `value` stand for `node` from now on, and pass the change on to what it looks at.

    Raises:
        GraphError: it can't be passed on, or may not be changed.
    """
    steps = _way_up(value)
    replace_node(value, node)
    top = value
    for child, view, inverse in steps:
        top = view.parent
        if inverse is None:
            _mark_stale(top, value._recorder.source_of(node))
            child._origin = None
            return
        replace_node(top, _record_inverse(inverse, child))
        view.seen = top._version
    if isinstance(top._origin, Hooked):
        place = top._origin
        written = Ref(top._node)
        place.last_write = top._recorder.write(place.hook, place.info, written, place.invoke)
    elif isinstance(top._origin, Gradient):
        known = top._origin
        known.last_write = top._recorder.write_gradient(known.backward, known.of, Ref(top._node))


def _way_up(value: Value) -> list[tuple[Value, View, Apply | None]]:
    """Return, for each view from `value` upwards, how its parent follows from it, if it does."""
    steps: list[tuple[Value, View, Apply | None]] = []
    current = value
    _check_changeable(current)
    while isinstance(current._origin, View):
        view = current._origin
        steps.append((current, view, _inverse(view)))
        current = view.parent
        _check_changeable(current)
    if isinstance(current._origin, Hooked):
        _check_up_to_date(current, current._origin)
        for child, view, inverse in steps:
            if inverse is None:
                _refuse_lost(child, view.apply.op, str(current._origin.hook))
    elif isinstance(current._origin, Gradient):
        _check_latest_gradient(current, current._origin)
        for child, view, inverse in steps:
            if inverse is None:
                _refuse_lost(child, view.apply.op, "the gradient")
    return steps


def _check_up_to_date(value: Value, place: Hooked) -> None:
    """Refuse a change that would undo another one, made since this value was read."""
    recorder = value._recorder
    write = recorder.last_write(place.hook, place.invoke)
    if write is not None and write != place.last_write:
        raise graph_error(
            f"{place.hook} has been written since this value was read, and changing this value "
            "would undo that; read it again and change what you get",
            hook=str(place.hook),
            other=recorder.source_of(write),
        )


def _check_latest_gradient(value: Value, gradient: Gradient) -> None:
    """Refuse a change that would undo another one, made since this gradient was read."""
    recorder = value._recorder
    write = recorder.last_gradient_write(gradient.backward, gradient.of)
    if write is not None and write != gradient.last_write:
        raise graph_error(
            "this gradient has been written since it was read, and changing what was read would "
            "undo that; read .grad again and change what you get",
            other=recorder.source_of(write),
        )


def _refuse_lost(child: Value, op: str, place: str) -> None:
    raise graph_error(
        f"a change through .{op}(...) can't be followed back to {place}; change it by indexing, or "
        "change a .clone() and assign that",
        other=child._recorder.source_of(child._node),
    )


def _mark_stale(value: Value, at: Source) -> None:
    value._stale = at
    while isinstance(value._origin, View):
        value = value._origin.parent
        value._stale = at


def _check_changeable(value: Value) -> None:
    recorder = value._recorder
    made, now = recorder.block_of(value._node).steps, recorder.block.steps
    if made != now and not isinstance(value._origin, Owned):
        raise graph_error(
            f"a value of {made} can't be changed in place at {now}, because no change is carried "
            "from step to step; read it again there, or change a .clone()",
            other=recorder.source_of(value._node),
        )
    if isinstance(value._origin, Owned):
        raise graph_error(
            f"{value._origin.path} belongs to the model, which others use too: it is read-only; "
            "change a .clone() of it"
        )
    if value._given is not None:
        raise graph_error(
            "this value has been given to the model; change it before that, or change the "
            "module's output itself",
            other=value._given,
        )


#: Stands in an inverse for the child's node, which is not known yet.
_CHILD = Ref(0)


def _inverse(view: View) -> Apply | None:
    """Return how the parent follows from a changed view of it, or None if it doesn't."""
    op, args = view.apply.op, list(view.apply.args[1:])
    named = view.apply.kwargs
    if view.parent._fields is not None or not view.certain:
        return None
    if op == "getitem":
        return Apply("setitem", [Ref(view.parent._node), args[0], _CHILD])
    if op in ("detach", SAME):
        return Apply(SAME, [_CHILD])
    if op in ("t", "transpose"):
        return Apply(op, [_CHILD, *args], named)
    if op == "movedim" and len(args) == 2:
        return Apply(op, [_CHILD, args[1], args[0]])
    if op == "unsqueeze":
        return Apply("squeeze", [_CHILD, *args], named)
    if op == "permute":
        order = _inverse_order(args[0] if args else named.get("dims"))
        return None if order is None else Apply(op, [_CHILD, order])
    if op in _NEVER_COPY:
        return Apply("reshape_as", [_CHILD, Ref(view.parent._node)])
    if op in MAY_COPY:
        shape = _shape_up_to_one(view.parent)
        return None if shape is None else Apply("reshape", [_CHILD, shape])
    return None


def _inverse_order(dims: Argument) -> Items | None:
    if not isinstance(dims, Items):
        return None
    order = [d % len(dims.values) for d in dims.values if isinstance(d, int)]
    if sorted(order) != list(range(len(dims.values))):
        return None
    return Items([order.index(dim) for dim in range(len(order))])


def _shape_up_to_one(value: Value) -> Items | None:
    """Return a value's shape with -1 for at most one size that only the server knows."""
    while isinstance(value._origin, View) and value._origin.apply.op == SAME:
        value = value._origin.parent
    if not isinstance(value._origin, Hooked):
        return None
    place = value._origin
    batch = len(value._recorder.invokes[place.invoke].prompts)
    sizes: list[Argument] = []
    for size in place.info.shape:
        sizes.append(batch if size == "batch" else -1 if isinstance(size, str) else size)
    return Items(sizes) if sizes.count(-1) <= 1 else None


def _record_inverse(inverse: Apply, child: Value) -> int:
    """Record the operation that makes the parent, with the child in its place."""
    if inverse.op == SAME:
        return child._node
    args = [Ref(child._node) if argument is _CHILD else argument for argument in inverse.args]
    return child._recorder.add(Apply(inverse.op, args, inverse.kwargs))


def _with_input(apply: Apply, node: int) -> Apply:
    return Apply(apply.op, [Ref(node), *apply.args[1:]], apply.kwargs)


def replace_node(value: Value, node: int) -> None:
    """Let `value` stand for another node, and views of it be made again when they are used."""
    value._recorder.guards.note_change(value, value._node)
    value._node = node
    value._version += 1
