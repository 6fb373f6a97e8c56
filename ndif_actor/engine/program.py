"""A program: a graph put in the order the forward will run it, or refused.

Each node runs at the latest hook point it depends on, in program order there; nodes that depend
on none run where they are first needed. A value is freed after its last use. Pure: no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ndif_actor.engine.hookpoints import HookTable, Moment, Site
from ndif_actor.errors import RequestError
from ndif_client.wire.graph import (
    CallModule,
    Graph,
    HookPoint,
    Node,
    ReadHook,
    Save,
    WriteHook,
    references,
)
from ndif_client.wire.messages import Fault

#: Order of nodes that need nothing from the forward.
BEFORE_FORWARD = -1


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """What to run at each moment of the forward.

    Attributes:
        graph: the checked graph.
        steps: node numbers by the order of their moment, each list in program order.
        dies: for each node, the earlier nodes whose values are last used by it.
        last: order of the last moment it needs; BEFORE_FORWARD if it needs no forward at all.
        sites: the site of each hook point it touches.
        outlives: nodes whose value is used after the moment that makes it.
    """

    graph: Graph
    steps: dict[int, list[int]]
    dies: list[list[int]]
    last: int
    sites: dict[HookPoint, Site]
    outlives: frozenset[int]

    def moments(self) -> set[Moment]:
        """The moments at which this program must be woken."""
        return {Moment(point.path, point.port, point.call) for point in self.sites}


def compile_graph(graph: Graph, table: HookTable, num_invokes: int) -> Program:
    """Order a graph's nodes along the forward.

    Raises:
        RequestError: the graph can never run: a reference to a later node, an unknown hook point,
            a module that can't be called, or a write of a value that does not exist yet.
    """
    uses = [references(node) for node in graph.nodes]
    _check_shape(graph, uses, num_invokes)
    sites = _find_sites(graph, table)
    orders = _orders(graph, uses, sites)
    steps: dict[int, list[int]] = {}
    for number, order in enumerate(orders):
        steps.setdefault(order, []).append(number)
    dies, outlives = _lifetimes(uses, orders, steps)
    return Program(
        graph=graph,
        steps=steps,
        dies=dies,
        last=max(steps, default=BEFORE_FORWARD),
        sites=sites,
        outlives=outlives,
    )


def graph_fault(graph: Graph, node: int, message: str, other: int | None = None) -> RequestError:
    """Return the error for a node that can never run, with the user's lines."""
    hook = getattr(graph.nodes[node], "hook", None)
    return RequestError(
        Fault(
            kind="graph",
            message=message,
            node=node,
            hook=None if hook is None else str(hook),
            source=graph.source_of(node),
            other_source=None if other is None else graph.source_of(other),
        )
    )


def _check_shape(graph: Graph, uses: Sequence[Sequence[int]], num_invokes: int) -> None:
    writes = (WriteHook, Save)
    for number, node in enumerate(graph.nodes):
        for used in uses[number]:
            if used >= number:
                raise graph_fault(
                    graph, number, f"node {number} refers to node {used}, a later one"
                )
            if isinstance(graph.nodes[used], writes):
                raise graph_fault(graph, number, f"node {used} is a write or save, not a value")
        if isinstance(node, ReadHook | WriteHook) and node.invoke >= num_invokes:
            raise graph_fault(
                graph, number, f"invoke {node.invoke} does not exist; there are {num_invokes}"
            )


def _find_sites(graph: Graph, table: HookTable) -> dict[HookPoint, Site]:
    sites: dict[HookPoint, Site] = {}
    for number, node in enumerate(graph.nodes):
        if isinstance(node, CallModule):
            _check_callable(graph, number, node, table)
        if not isinstance(node, ReadHook | WriteHook):
            continue
        try:
            site = table.find(node.hook)
        except LookupError as error:
            raise graph_fault(graph, number, str(error)) from None
        if isinstance(node, WriteHook) and not site.dtype.is_floating_point:
            raise graph_fault(
                graph,
                number,
                f"{node.hook} holds integers and is read-only; to change what the model sees, "
                "write the output of its embedding",
            )
        sites[node.hook] = site
    return sites


def _check_callable(graph: Graph, number: int, node: CallModule, table: HookTable) -> None:
    prefix = f"{node.path}." if node.path else ""
    if any(path == node.path or path.startswith(prefix) for path in table.attention):
        raise graph_fault(
            graph,
            number,
            f"{node.path or 'the model'!r} attends, so it can't be called on a value; call the "
            "norms, MLPs or projections in it, or trace another prompt",
        )


def _orders(graph: Graph, uses: Sequence[Sequence[int]], sites: dict[HookPoint, Site]) -> list[int]:
    """Return for each node the order of the moment it runs at."""
    nodes = graph.nodes
    orders: list[int] = []
    latest: list[int | None] = []
    for number, node in enumerate(nodes):
        used = uses[number]
        # The read that makes a value late is remembered, to be named when it is too late.
        late = max(used, key=lambda n: orders[n], default=None)
        order = orders[late] if late is not None else BEFORE_FORWARD
        culprit = latest[late] if late is not None else None
        if isinstance(node, ReadHook):
            order, culprit = sites[node.hook].order, number
        elif isinstance(node, WriteHook):
            target = sites[node.hook].order
            if order > target:
                _refuse_late(graph, number, node, culprit)
            order = target
        orders.append(order)
        latest.append(culprit)
    return _postponed(nodes, uses, orders)


def _refuse_late(graph: Graph, number: int, node: WriteHook, culprit: int | None) -> None:
    read = graph.nodes[culprit] if culprit is not None else None
    where = str(read.hook) if isinstance(read, ReadHook) else "a later hook point"
    raise graph_fault(
        graph,
        number,
        f"{node.hook} is written with a value that needs {where}, which the model reaches only "
        "afterwards",
        culprit,
    )


def _postponed(
    nodes: Sequence[Node], uses: Sequence[Sequence[int]], orders: list[int]
) -> list[int]:
    """Move nodes that need nothing from the forward to where they are first used."""
    first_use: dict[int, int] = {}
    for number in range(len(nodes) - 1, -1, -1):
        if orders[number] == BEFORE_FORWARD and not isinstance(nodes[number], Save):
            orders[number] = first_use.get(number, BEFORE_FORWARD)
        for used in uses[number]:
            first_use[used] = min(first_use.get(used, orders[number]), orders[number])
    return orders


def _lifetimes(
    uses: Sequence[Sequence[int]], orders: list[int], steps: dict[int, list[int]]
) -> tuple[list[list[int]], frozenset[int]]:
    """Return what dies at each node, and which values outlive the moment that makes them."""
    last_use: dict[int, int] = {}
    outlives = set()
    for order in sorted(steps):
        for number in steps[order]:
            for used in uses[number]:
                last_use[used] = number
                if orders[used] != order:
                    outlives.add(used)
    dies: list[list[int]] = [[] for _ in uses]
    for used, number in last_use.items():
        dies[number].append(used)
    return dies, frozenset(outlives)
