"""Backwards and gradients while they are recorded: `loss.backward()`, `h.grad`, `h.grad = ...`."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from ndif_client.arguments import encode_content
from ndif_client.errors import GraphError, graph_error
from ndif_client.recorder import Recorder
from ndif_client.values import Gradient, Owned, Value, View, node_of
from ndif_client.wire.catalogue import CATALOGUE
from ndif_client.wire.graph import (
    PREFILL,
    Apply,
    Backward,
    ReadGradient,
    ReadHook,
    WriteHook,
    references,
)


class BackwardBlock:
    """One `backward()`: as a `with` block, `.grad` means its gradients inside."""

    def __init__(self, recorder: Recorder, number: int) -> None:
        self._recorder = recorder
        self._number = number
        self._previous: int | None = None

    def __enter__(self) -> Self:
        self._recorder.check_open()
        self._previous, self._recorder.backward = self._recorder.backward, self._number
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._recorder.backward = self._previous


def differentiate(loss: Value, gradient: Any) -> BackwardBlock:
    """Record that a value is differentiated.

    Args:
        loss: one number, unless a gradient is given.
        gradient: what to begin with, of the loss's shape.

    Raises:
        GraphError: the value belongs to a generation.
    """
    recorder = loss._recorder
    _check_trace(recorder, "backward()")
    start = None if gradient is None else _reference(encode_content(gradient, recorder))
    return BackwardBlock(recorder, recorder.differentiate(node_of(loss), start))


def read_gradient(value: Value) -> tuple[int, Gradient]:
    """Record a read of a value's gradient; return its node and whose it is.

    Raises:
        GraphError: nothing was differentiated yet, or it is a parameter's.
    """
    recorder, of = value._recorder, _watched(value)
    number = recorder.read_gradient(of)
    assert recorder.backward is not None
    written = recorder.last_gradient_write(recorder.backward, of)
    return number, Gradient(recorder.backward, of, written)


def write_gradient(value: Value, gradient: Any) -> None:
    """Record that a value's gradient is replaced; what it was made from gets other gradients."""
    recorder, of = value._recorder, _watched(value)
    assert recorder.backward is not None
    own = gradient._origin if isinstance(gradient, Value) else None
    if isinstance(own, Gradient) and (own.backward, own.of) == (recorder.backward, of):
        written = recorder.last_gradient_write(recorder.backward, of)
        if written is not None and written == own.last_write:
            return  # `h.grad *= 2` has written it already
    recorder.write_gradient(recorder.backward, of, encode_content(gradient, recorder))


def influencing(recorder: Recorder, backward: int) -> set[int]:
    """Return the nodes that the loss of a backward depends on, as the server sees it."""
    node = recorder.node(backward)
    assert isinstance(node, Backward)
    found = {node.loss.node}
    invokes: set[int] = set()  # in whose rows something is looked at later
    for number, node in reversed(recorder.nodes_in_order()):
        if isinstance(node, WriteHook):
            found.update(references(node) if node.invoke in invokes else ())
        elif number not in found or isinstance(node, ReadGradient):
            continue
        elif isinstance(node, ReadHook):
            invokes.add(node.invoke)
        elif not (isinstance(node, Apply) and _cuts(node.op)):
            found.update(references(node))
    return found


def _cuts(name: str) -> bool:
    op = CATALOGUE.get(name)
    return op is None or not op.differentiable or name == "detach"


def _watched(value: Value) -> int:
    recorder = value._recorder
    recorder.check_open()
    _check_trace(recorder, ".grad")
    if isinstance(value._origin, Owned):
        raise graph_error(
            f"{value._origin.path} belongs to the model, and has no gradient of its own: take the "
            "gradient of an activation, or of a .clone() of the parameter that you use"
        )
    if recorder.backward is None:
        raise graph_error(
            "there is no gradient before a backward: call loss.backward() first, and ask for "
            ".grad after it"
        )
    return recorder.first_read(node_of(value))


def unused_part(value: Value) -> View | None:
    """Return where a value lies in another one, if it was only looked at: `h[:, -1].grad`."""
    view = value._origin
    if not isinstance(view, View) or view.apply.op != "getitem":
        return None
    return None if value._recorder.is_used(value._node) else view


def _check_trace(recorder: Recorder, what: str) -> None:
    if recorder.edits:
        raise graph_error(f"{what}: an edit has no gradients; take them in the trace it applies to")
    if recorder.generates or recorder.block.steps != PREFILL:
        raise graph_error(
            f"{what}: a generation has no gradients, because its steps share a KV cache; trace its "
            "tokens as a prompt and differentiate there"
        )


def _reference(encoded: Any) -> int:
    number = getattr(encoded, "node", None)
    if number is None:
        raise graph_error(
            "backward(gradient=...) takes a value or an array of the loss's shape", GraphError
        )
    return int(number)
