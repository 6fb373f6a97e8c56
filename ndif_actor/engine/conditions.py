"""Which nodes run only under conditions, and which of their values may be used where. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ndif_actor.engine.checks import graph_fault
from ndif_actor.errors import RequestError
from ndif_client.wire.graph import (
    MAX_CONDITION_DEPTH,
    Backward,
    Choose,
    Condition,
    EndGeneration,
    Graph,
    Keep,
    ReadGradient,
    WriteGradient,
)
from ndif_client.wire.messages import Fault


class Decision(msgspec.Struct, frozen=True):
    """What must hold: that the value of a node is not zero, or, negated, that it is."""

    node: int
    negated: bool


class Conditions:
    """The conditions of a graph, checked.

    Attributes:
        deciding: the nodes whose values decide.
        innermost: for each node that runs under conditions, the innermost of them; as the node it
            asks for runs only if the outer ones hold, no other needs to be looked at.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._chains: list[tuple[Decision, ...]] = [()]
        for place, condition in enumerate(graph.conditions):
            self._chains.append(self._chain(place, condition))
        if graph.under and len(graph.under) != len(graph.nodes):
            raise _malformed("there is not one condition, or none, for each node")
        if any(under >= len(self._chains) for under in graph.under):
            raise _malformed("a node runs under a condition that is not there")
        deciders = (node for node in graph.nodes if isinstance(node, Choose | EndGeneration))
        self.deciding = frozenset(
            (
                *(condition.value for condition in graph.conditions),
                *(decider.condition.node for decider in deciders),
            )
        )
        chains = ((number, self.of(number)) for number in range(len(graph.nodes)))
        self.innermost = {number: chain[-1] for number, chain in chains if chain}

    def of(self, node: int) -> tuple[Decision, ...]:
        """Return what must hold for a node to run, the outermost condition first."""
        return self._chains[self._graph.under[node]] if self._graph.under else ()

    def check(self, uses: Sequence[Sequence[int]]) -> None:
        """Check that no node uses a value that may not have been made.

        Raises:
            RequestError: one does.
        """
        for number, node in enumerate(self._graph.nodes):
            own = self.of(number)
            if isinstance(node, Backward | Keep) and own:
                what = "a backward runs" if isinstance(node, Backward) else "a value is kept"
                raise graph_fault(
                    self._graph, number, f"{what} in any case, so not in a `when` block"
                )
            for used in uses[number]:
                allowed = own
                if isinstance(node, Choose) and used != node.condition.node:
                    branch = Decision(node.condition.node, used != node.then.node)
                    allowed = (*own, branch)
                if isinstance(node, ReadGradient | WriteGradient) and used == node.of.node:
                    allowed = ()
                needed = self.of(used)
                if needed != allowed[: len(needed)]:
                    raise graph_fault(
                        self._graph,
                        number,
                        "a value made under a condition is used where that need not hold; choose "
                        "between it and another one",
                        used,
                    )

    def _chain(self, place: int, condition: Condition) -> tuple[Decision, ...]:
        if condition.value >= len(self._graph.nodes) or condition.outer > place:
            raise _malformed("a condition refers to what is not there")
        if len(self._chains[condition.outer]) >= MAX_CONDITION_DEPTH:
            raise _malformed(f"more than {MAX_CONDITION_DEPTH} conditions lie in each other")
        return (*self._chains[condition.outer], Decision(condition.value, condition.negated))


def _malformed(message: str) -> RequestError:
    return RequestError(Fault(kind="graph", message=message))
