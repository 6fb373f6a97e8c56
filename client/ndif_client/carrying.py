"""Variables that a block of steps would carry from step to step, if it were a loop: none can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ndif_client.errors import OrderError, graph_error
from ndif_client.sources import user_frame
from ndif_client.wire.graph import references

if TYPE_CHECKING:
    from ndif_client.recorder import Recorder


def variables(recorder: Recorder) -> dict[str, int]:
    """Return the nodes that the user's variables stand for now, by their names."""
    frame = user_frame()
    held = {} if frame is None else dict(frame.f_locals)
    return {
        name: value._node
        for name, value in held.items()
        if getattr(value, "_recorder", None) is recorder and hasattr(value, "_node")
    }


def check_carried(recorder: Recorder, before: Mapping[str, int], first: int) -> None:
    """Refuse a variable that is made of its own value before a block: `total = total + h`.

    Args:
        recorder: of the generation, at the end of the block.
        before: what `variables` gave at its beginning.
        first: number of the first node that was recorded in it.

    Raises:
        OrderError: there is one.
    """
    for name, node in variables(recorder).items():
        earlier = before.get(name)
        if earlier is None or node < first or earlier not in _made_from(recorder, node, first):
            continue
        raise graph_error(
            f"{name!r} is made of its own value before this block: steps are recorded once, so "
            "nothing is carried from step to step. Save what each step makes, and join that "
            "afterwards; or give it another name, if it is to begin anew at every step",
            OrderError,
            source=recorder.source_of(node),
        )


def _made_from(recorder: Recorder, node: int, first: int) -> set[int]:
    """Return what a node is made from, by way of nodes from `first` on."""
    found: set[int] = set()
    waiting = [node]
    while waiting:
        for used in references(recorder.node(waiting.pop())):
            if used not in found:
                found.add(used)
                if used >= first:
                    waiting.append(used)
    return found
