"""What a request will keep: one shape and dtype for each name, whenever it ends.

Those that come after it are checked against that before it has run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ndif_actor.engine.checks import graph_fault
from ndif_actor.engine.held import shown, spec_of
from ndif_actor.engine.program import Program
from ndif_actor.engine.shapes import Shapes
from ndif_client.wire.graph import Keep
from ndif_client.wire.messages import HeldSpec


def specs_kept(program: Program, last: Shapes, first: Callable[[], Shapes]) -> dict[str, HeldSpec]:
    """Return what is kept, by name.

    Args:
        program: the compiled graph.
        last: the shapes of its values; of those that repeat after the prefill, at the last step.
        first: returns the same, at the first step.

    Raises:
        RequestError: a value is kept at several steps, and is not of one shape and dtype.
    """
    graph = program.graph
    found: dict[str, HeldSpec] = {}
    earlier: Shapes | None = None
    for number, node in enumerate(graph.nodes):
        if not isinstance(node, Keep):
            continue
        steps = graph.steps_of(number)
        values = _values(node, number, last)
        if not steps.single and number in last.decode:
            earlier = earlier or first()
            values += _values(node, number, earlier)
        specs = [spec_of(value) for value in values]
        different = [spec for spec in specs if spec != specs[0]]
        if different:
            raise graph_fault(
                graph,
                number,
                f"{node.name!r} would be kept at {steps}, where its value is not of one "
                f"shape: {shown(specs[0])} and {shown(different[0])} among others; keep it at one "
                "step, or a part of it that is always there, such as its last row",
            )
        found[node.name] = specs[0]
    return found


def _values(node: Keep, number: int, shapes: Shapes) -> list[Any]:
    """Return what is kept at the prefill and later, where it is."""
    value = node.value.node
    at_prefill = [shapes.prefill[value]] if number in shapes.prefill else []
    return at_prefill + ([shapes.at(1)[value]] if number in shapes.decode else [])
