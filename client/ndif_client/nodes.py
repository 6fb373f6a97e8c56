"""The nodes of one trace, in the order they are written."""

from __future__ import annotations

from typing import Any

from ndif_client.guards import Guards
from ndif_client.steps import Block
from ndif_client.wire.graph import Node, Source


class Nodes:
    """What all parts of a recorder share: the nodes so far, and a way to add one.

    Attributes:
        edits: whether it is about an edit, which nothing comes back from.
        guards: the conditions that nodes run under.
    """

    edits: bool
    guards: Guards

    def __init__(self) -> None:
        self._nodes: list[Node] = []
        self._blocks: list[Block] = []

    def add(self, node: Node, order: int | None = None, *, block: Block | None = None) -> int:
        """Append a node and return its number; see `Recorder.add`."""
        raise NotImplementedError

    def source_of(self, node: int) -> Source:
        """Return the user's line that made a node."""
        raise NotImplementedError

    def node(self, number: int) -> Any:
        """Return a node."""
        return self._nodes[number]
