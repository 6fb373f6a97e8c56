"""Why a graph can never run, as far as that can be told from its nodes and the hook table alone."""

from __future__ import annotations

from collections.abc import Sequence

from ndif_actor.engine.hookpoints import HookTable, Site
from ndif_actor.errors import RequestError
from ndif_client.wire.graph import (
    Backward,
    CallModule,
    EndGeneration,
    Graph,
    HookPoint,
    Keep,
    Log,
    ReadHook,
    Save,
    WriteGradient,
    WriteHook,
)
from ndif_client.wire.messages import Fault


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


def check_references(graph: Graph, uses: Sequence[Sequence[int]], num_invokes: int) -> None:
    """Check that nodes refer to values made before them, and to invokes that exist.

    Raises:
        RequestError: one does not.
    """
    writes = (WriteHook, Keep, Save, Log, EndGeneration, Backward, WriteGradient)
    for number, node in enumerate(graph.nodes):
        for used in uses[number]:
            if used >= number:
                raise graph_fault(
                    graph, number, f"node {number} refers to node {used}, a later one"
                )
            if isinstance(graph.nodes[used], writes):
                raise graph_fault(graph, number, f"node {used} is not a value")
        if isinstance(node, ReadHook | WriteHook) and node.invoke >= num_invokes:
            known = f"there are {num_invokes}" if num_invokes else "this request has no prompt"
            raise graph_fault(graph, number, f"invoke {node.invoke} does not exist; {known}")


def check_steps(graph: Graph, uses: Sequence[Sequence[int]]) -> dict[int, int | None]:
    """Check which steps' values are used where; return which are kept, and until which step."""
    if not graph.during:
        return {}
    if len(graph.during) != len(graph.nodes) or max(graph.during) >= len(graph.steps):
        raise RequestError(Fault(kind="graph", message="not every node has its steps"))
    for steps in graph.steps:
        if steps.stop is not None and steps.stop <= steps.start:
            raise RequestError(Fault(kind="graph", message=f"{steps} are none at all"))
    kept: dict[int, int | None] = {}
    for number in range(len(graph.nodes)):
        own = graph.steps_of(number)
        for used in uses[number]:
            other = graph.steps_of(used)
            if graph.during[used] == graph.during[number]:
                continue
            if other.single and other.start <= own.start:
                last = own.last
                known = kept.get(used, last)
                kept[used] = None if last is None or known is None else max(known, last)
            elif not other.includes(own):
                raise graph_fault(
                    graph,
                    number,
                    f"at {own} there is no one value of {other}: a value can be used in its own "
                    "step, and one of a single step also later",
                    used,
                )
    return kept


def find_sites(graph: Graph, table: HookTable) -> dict[HookPoint, Site]:
    """Return the site of each hook point that a graph touches; raises as the others do."""
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
