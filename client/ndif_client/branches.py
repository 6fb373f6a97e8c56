"""Control as data: what runs only under a condition, choices, and loops with a bound.

Python's own `if` and `while` run while the program is recorded, when no value is known. These
record both ways, and the server takes the one that the values tell.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import numpy as np

from ndif_client.arguments import encode
from ndif_client.errors import graph_error
from ndif_client.proxy import Proxy
from ndif_client.recorder import Recorder
from ndif_client.values import Delegate, Value, View, node_of, replace_node
from ndif_client.wire.graph import MAX_CONDITION_DEPTH, Choose, Ref
from ndif_client.wire.tensors import is_array


class Branch:
    """Code that runs only if a condition holds: `with trace.when(score > 3): ...`.

    What it writes to the model is written then only. A value that was there before and is changed
    in place inside has, after the block, whichever of its two values applies.
    """

    def __init__(self, recorder: Recorder, condition: int, *, negated: bool = False) -> None:
        self._recorder = recorder
        self._condition = condition
        self._negated = negated
        self._stack = ExitStack()

    def otherwise(self) -> Branch:
        """Return the block whose code runs only if the condition does not hold."""
        return Branch(self._recorder, self._condition, negated=not self._negated)

    def __enter__(self) -> Self:
        recorder = self._recorder
        self._stack.enter_context(recorder.under(self._condition, negated=self._negated))
        self._changes = self._stack.enter_context(recorder.guards.noting_changes())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
        if error is not None:
            return
        guards = self._recorder.guards
        for value, before in self._changes:
            if isinstance(value._origin, View):
                value._origin.seen = -1  # what it looks at has changed: it is made again
                continue
            if not guards.is_made(before, guards.now):
                continue  # it was read inside too, and is nothing outside
            after = value._node
            then, otherwise = (before, after) if self._negated else (after, before)
            choice = Choose(Ref(self._condition), Ref(then), Ref(otherwise))
            replace_node(value, self._recorder.add(choice))


def branch(condition: Any, recorder: Recorder) -> Branch:
    """Return the block of code that runs only if a value of the trace is not 0.

    Raises:
        GraphError: the condition is known now already.
    """
    return Branch(recorder, _condition(condition, recorder))


def end_generation(condition: Any, recorder: Recorder) -> None:
    """Record that the generation ends with a step where a value is not 0.

    Raises:
        GraphError: the condition is known now already.
    """
    recorder.end_when(_condition(condition, recorder))


def choose(condition: Any, then: Any, otherwise: Any, recorder: Recorder) -> Proxy:
    """Record a choice between two values of equal shape and dtype."""
    node = Choose(
        Ref(_condition(condition, recorder)), _value(then, recorder), _value(otherwise, recorder)
    )
    return Proxy(recorder, recorder.add(node))


def while_loop(
    condition: Callable[..., Any],
    body: Callable[..., Any],
    state: Any,
    limit: int,
    recorder: Recorder,
) -> Any:
    """Record a loop, each of its rounds under the condition that the last one has left.

    Raises:
        GraphError: the bound is none, or the body does not return a state like the one it got.
    """
    if not isinstance(limit, int) or not 0 < limit <= MAX_CONDITION_DEPTH:
        raise graph_error(f"a loop has a bound of 1 to {MAX_CONDITION_DEPTH} rounds, not {limit!r}")
    several = isinstance(state, tuple | list)
    values = tuple(state) if several else (state,)
    start = tuple(Proxy(recorder, _value(value, recorder).node) for value in values)
    final = _rounds(condition, body, start, limit, recorder)
    return final if several else final[0]


def _rounds(
    condition: Callable[..., Any],
    body: Callable[..., Any],
    state: tuple[Proxy, ...],
    limit: int,
    recorder: Recorder,
) -> tuple[Proxy, ...]:
    if limit == 0:
        return state
    holds = _condition(condition(*state), recorder)
    with recorder.under(holds):
        made = body(*state)
        values = tuple(made) if isinstance(made, tuple | list) else (made,)
        if len(values) != len(state):
            raise graph_error(
                f"the body of a loop returns its next state: {len(state)} value(s), not "
                f"{len(values)}"
            )
        following = tuple(Proxy(recorder, _value(value, recorder).node) for value in values)
        final = _rounds(condition, body, following, limit - 1, recorder)
    return tuple(
        Proxy(recorder, recorder.add(Choose(Ref(holds), Ref(node_of(then)), Ref(node_of(before)))))
        for then, before in zip(final, state, strict=True)
    )


def _condition(value: Any, recorder: Recorder) -> int:
    if not isinstance(value, Value | Delegate):
        raise graph_error(
            f"{value!r:.80} is known now, so Python's own `if` decides; a condition here is a "
            "value of the trace"
        )
    encoded = encode(value, recorder)
    assert isinstance(encoded, Ref)
    return encoded.node


def _value(value: Any, recorder: Recorder) -> Ref:
    if not isinstance(value, Value | Delegate) and not is_array(value):
        value = np.asarray(value, dtype=np.float32 if isinstance(value, float) else None)
    encoded = encode(value, recorder)
    assert isinstance(encoded, Ref)
    return encoded
