"""Gradients in a program: which values are differentiated for, and when their gradients are known.

A backward runs after the forward. The gradient of a value is complete when those of all values
made after it are, so gradients become known in the reverse order of the forward: a backward has
moments of its own, one for each value whose gradient a node reads or writes. Pure: no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ndif_actor.engine.checks import graph_fault
from ndif_actor.engine.hookpoints import Site
from ndif_client.wire.catalogue import CATALOGUE
from ndif_client.wire.graph import (
    MAX_NODES,
    Apply,
    Backward,
    Choose,
    Graph,
    Held,
    HookPoint,
    Parameter,
    ReadGradient,
    ReadHook,
    WriteGradient,
    WriteHook,
)

#: Orders from here on lie after every moment of the forward.
AFTER_FORWARD = 1 << 40


class BackwardPlan(msgspec.Struct, frozen=True):
    """One backward.

    Attributes:
        node: the number of the `Backward`.
        order: when it begins.
        moments: the values whose gradients are looked at, in the order these become known, and
            the order of the moment of each.
    """

    node: int
    order: int
    moments: tuple[tuple[int, int], ...]


def watched_values(graph: Graph) -> dict[int, dict[int, int]]:
    """Return, for each backward, the values whose gradients are used, with the first node that is.

    Raises:
        RequestError: a gradient belongs to no backward, or there is none of such a value.
    """
    found: dict[int, dict[int, int]] = {}
    for number, node in enumerate(graph.nodes):
        if isinstance(node, Backward):
            found[number] = {}
        if not isinstance(node, ReadGradient | WriteGradient):
            continue
        if node.backward not in found:
            raise graph_fault(graph, number, f"node {node.backward} is no backward before this one")
        if isinstance(graph.nodes[node.of.node], Parameter):
            raise graph_fault(
                graph,
                number,
                "there are no gradients of the model's own parameters, which others use too; "
                "differentiate for an activation, or for a .clone() of the parameter that you use",
            )
        found[node.backward].setdefault(node.of.node, number)
    return found


def plan_backwards(
    graph: Graph,
    uses: Sequence[Sequence[int]],
    orders: Mapping[int, int],
    watched: Mapping[int, Mapping[int, int]],
    sites: Mapping[HookPoint, Site],
) -> tuple[BackwardPlan, ...]:
    """Return the backwards in their order, and the moments of each.

    Args:
        graph: as it came.
        uses: for each node, the nodes it uses.
        orders: of the nodes; those that need a gradient are at `AFTER_FORWARD` or later.
        watched: for each backward, the values whose gradients are used, and where first.
        sites: of the hook points.

    Raises:
        RequestError: a value can have no gradient in its backward.
    """
    plans: list[BackwardPlan] = []
    for place, (number, values) in enumerate(watched.items()):
        begins = AFTER_FORWARD + place * (MAX_NODES + 1)
        backward = graph.nodes[number]
        assert isinstance(backward, Backward)
        for value, used_at in values.items():
            if not _depends(graph, uses, orders, sites, backward.loss.node, value):
                raise graph_fault(
                    graph,
                    used_at,
                    f"there is no gradient of {_named(graph, value)}, because what is "
                    f"differentiated does not depend on it{_why(graph, uses, number, value)}",
                    number,
                )
        latest_first = sorted(values, key=lambda value: (orders[value], value), reverse=True)
        moments = tuple((value, begins + 1 + i) for i, value in enumerate(latest_first))
        plans.append(BackwardPlan(number, begins, moments))
    return tuple(plans)


def _named(graph: Graph, value: int) -> str:
    node = graph.nodes[value]
    return f"the held value {node.name!r}" if isinstance(node, Held) else "this value"


def _why(graph: Graph, uses: Sequence[Sequence[int]], backward: int, value: int) -> str:
    """Return what may have been overlooked."""
    loss = graph.nodes[backward]
    assert isinstance(loss, Backward)
    before = _made_from(uses, loss.loss.node)
    for number in sorted(before):
        node = graph.nodes[number]
        if isinstance(node, ReadGradient):
            return " but by gradients: gradients of gradients are not offered"
        if not isinstance(node, Apply) or value not in _made_from(uses, number):
            continue
        op = CATALOGUE.get(node.op)
        if op is not None and (not op.differentiable or op.name == "detach"):
            return f" but by {node.op}, which has no gradient"
    whole = graph.nodes[value]
    if isinstance(whole, Apply) and whole.op == "getitem":
        return ": this part of a value was not used for it; of the part h[...], take h.grad[...]"
    return ""


def _made_from(uses: Sequence[Sequence[int]], number: int) -> set[int]:
    """Return a node and all that it is made from."""
    found, waiting = {number}, [number]
    while waiting:
        for used in uses[waiting.pop()]:
            if used not in found:
                found.add(used)
                waiting.append(used)
    return found


def _depends(
    graph: Graph,
    uses: Sequence[Sequence[int]],
    orders: Mapping[int, int],
    sites: Mapping[HookPoint, Site],
    loss: int,
    value: int,
) -> bool:
    """Whether the loss can change with a value, by the nodes or through the model."""
    influenced: set[int] = set()
    # The earliest moment from which on the rows of an invoke depend on the value.
    since: dict[int, int] = {}
    in_order = sorted(orders, key=lambda number: (orders[number], number))
    for number in in_order:
        node = graph.nodes[number]
        if number == value:
            influenced.add(number)
            if isinstance(node, ReadHook):
                since[node.invoke] = min(since.get(node.invoke, orders[number]), orders[number])
        elif isinstance(node, ReadGradient):
            continue  # a number for what is made of it: gradients of gradients are not offered
        elif isinstance(node, WriteHook):
            if any(used in influenced for used in uses[number]):
                order = sites[node.hook].order
                since[node.invoke] = min(since.get(node.invoke, order), order)
        elif isinstance(node, ReadHook):
            if node.invoke in since:
                influenced.add(number)
        elif isinstance(node, Choose):
            if node.then.node in influenced or node.otherwise.node in influenced:
                influenced.add(number)
        elif isinstance(node, Apply):
            op = CATALOGUE.get(node.op)
            differentiable = op is not None and op.differentiable and op.name != "detach"
            if differentiable and any(used in influenced for used in uses[number]):
                influenced.add(number)
        elif any(used in influenced for used in uses[number]):
            influenced.add(number)
    return loss in influenced
