"""Which steps of a generation a line of the program is about, and when its values are known there.

A line outside of all steps blocks belongs to step 0, the prefill, which is all of a trace.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from ndif_client.errors import graph_error
from ndif_client.wire.graph import PREFILL, Steps

#: When a value is known in a forward: the order of the last hook point it needs, and the node
#: that read it.
Moment = tuple[int, int]

#: The moment of what needs nothing from the forward.
BEFORE_FORWARD: Moment = (-1, -1)

#: The order of gradients: after every hook point's.
AFTER_FORWARD = 1 << 40


class Block(NamedTuple):
    """The steps that nodes are recorded for.

    Attributes:
        steps: which.
        as_list: whether saved values come back as a list, one for each step reached. A slice gives
            a list even where it has only one step, as slices do in Python.
    """

    steps: Steps
    as_list: bool = False


#: What a program is about that opens no steps block.
PREFILL_BLOCK = Block(PREFILL)


def block_at(index: Any, max_new_tokens: int) -> Block:
    """Return the block that `gen.steps[index]` opens.

    Raises:
        GraphError: it is no step or slice of steps from 0, or has none below `max_new_tokens`.
    """
    if isinstance(index, slice):
        start = 0 if index.start is None else _step(index.start, "start")
        stop = None if index.stop is None else _step(index.stop, "stop")
        stride = 1 if index.step is None else _step(index.step, "stride")
        if stride == 0:
            raise graph_error("gen.steps[...]: the stride of a slice is at least 1")
        if stop is not None and stop <= start:
            raise graph_error(f"gen.steps[{start}:{stop}] has no steps")
        block = Block(Steps(start, stop, stride), as_list=True)
    else:
        start = _step(index, "step")
        block = Block(Steps(start, start + 1))
    if start >= max_new_tokens:
        raise graph_error(
            f"step {start} is never reached: max_new_tokens={max_new_tokens} makes steps 0 to "
            f"{max_new_tokens - 1}"
        )
    return block


def overlap(one: Steps, other: Steps) -> bool:
    """Whether any step is in both."""
    if one.stride > other.stride:
        one, other = other, one
    # Common steps repeat with a period of at most stride x stride, so few of the sparser matter.
    first = max(other.start, one.start)
    first += -(first - other.start) % other.stride
    candidates = range(first, first + one.stride * other.stride, other.stride)
    return any(step in one and step in other for step in candidates)


class Moments:
    """When the value of each node is known: at which steps, and how far into their forward.

    Of a block of many steps the first is told apart, because values of single steps are made in
    the order of that step's forward and are there from the beginning of each later one.
    """

    def __init__(self) -> None:
        self._steps: list[Steps] = []
        self._known: list[tuple[Moment, Moment]] = []

    def add(self, steps: Steps, uses: list[int], own: Moment = BEFORE_FORWARD) -> None:
        """Note the next node, which runs at `steps`, uses other nodes, and needs `own` itself."""
        known = [self.known(node, steps) for node in uses]
        first = max((own, *(moment for moment, _ in known)))
        later = max((own, *(moment for _, moment in known)))
        self._steps.append(steps)
        self._known.append((first, later))

    def exists(self, node: int, steps: Steps) -> bool:
        """Whether a node has one value, already made, at each of `steps`."""
        own = self._steps[node]
        return own.includes(steps) or (own.single and own.start <= steps.start)

    def known(self, node: int, steps: Steps) -> tuple[Moment, Moment]:
        """Return when a node's value is known: in the first of `steps`, and in the others."""
        own = self._steps[node]
        first, later = self._known[node]
        if own.single:
            return (first if own.start == steps.start else BEFORE_FORWARD), BEFORE_FORWARD
        return (first if own.start == steps.start else later), later

    def latest(self, node: int, steps: Steps) -> Moment:
        """Return the latest moment at which a node's value becomes known in any of `steps`."""
        first, later = self.known(node, steps)
        return first if steps.single else max(first, later)


def _step(number: Any, what: str) -> int:
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise graph_error(
            f"gen.steps[...] takes a step or a slice of steps, known while recording; its {what} "
            f"can't be {type(number).__name__}"
        )
    step = operator.index(number)
    if step < 0:
        raise graph_error(
            f"gen.steps[...]: {what} {step} is negative; steps count from 0, the prefill, because "
            "nobody knows beforehand which is the last"
        )
    return step
