"""Which condition each node of a trace runs under, and which values change under one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ndif_client.errors import LimitError
from ndif_client.wire.graph import MAX_CONDITION_DEPTH, MAX_CONDITIONS, Condition


class Guards:
    """The conditions of one trace, numbered from 1; 0 stands for none.

    Attributes:
        conditions: all of them, in order.
        now: the one that nodes are recorded under.
        of: the one of each node, by its number.
    """

    def __init__(self) -> None:
        self.conditions: list[Condition] = []
        self.now = 0
        self.of: list[int] = []
        self._noting: list[dict[int, tuple[Any, int]]] = []

    def add(self, value: int, negated: bool, outer: int) -> int:
        """Add a condition inside of another one and return its number.

        Raises:
            LimitError: there are too many.
        """
        if len(self.conditions) >= MAX_CONDITIONS:
            raise LimitError(f"a trace has at most {MAX_CONDITIONS} conditions")
        if len(self._chain(outer)) >= MAX_CONDITION_DEPTH:
            raise LimitError(f"at most {MAX_CONDITION_DEPTH} conditions lie in each other")
        self.conditions.append(Condition(value, negated, outer))
        return len(self.conditions)

    @contextmanager
    def under(self, condition: int) -> Iterator[None]:
        """Within the block, nodes are recorded under a condition of that number."""
        previous, self.now = self.now, condition
        try:
            yield
        finally:
            self.now = previous

    def is_made(self, node: int, under: int) -> bool:
        """Whether the value of a node exists wherever a condition holds."""
        return self.of[node] in (0, *self._chain(under))

    def _chain(self, under: int) -> list[int]:
        """Return a condition and those it lies in, the innermost first."""
        chain = []
        while under:
            chain.append(under)
            under = self.conditions[under - 1].outer
        return chain

    # ------------------------------------------------------------ values changed in place

    @contextmanager
    def noting_changes(self) -> Iterator[list[tuple[Any, int]]]:
        """Within the block, note which values are changed in place, and their nodes before it."""
        noted: dict[int, tuple[Any, int]] = {}
        changes: list[tuple[Any, int]] = []
        self._noting.append(noted)
        try:
            yield changes
        finally:
            self._noting.pop()
            changes += noted.values()

    def note_change(self, value: Any, node: int) -> None:
        """Note that a value stood for `node` until now."""
        if self._noting:
            self._noting[-1].setdefault(id(value), (value, node))
