"""Modules that a trace skips, and what can't be read or written for that."""

from __future__ import annotations

from ndif_client.errors import graph_error
from ndif_client.sources import capture
from ndif_client.steps import overlap
from ndif_client.wire.graph import HookPoint, Node, ReadHook, Source, Steps, WriteHook


class Skips:
    """The skipped modules of one trace, by invoke and steps."""

    def __init__(self) -> None:
        self._skipped: dict[tuple[str, int], list[tuple[Steps, Source]]] = {}

    def add(self, path: str, invoke: int, steps: Steps) -> None:
        """Note that a module is skipped from now on."""
        self._skipped.setdefault((path, invoke), []).append((steps, capture()))

    def check(self, hook: HookPoint, invoke: int, steps: Steps) -> None:
        """Refuse what lies inside of a skipped module.

        Raises:
            GraphError: this does.
        """
        for (path, skipped_invoke), places in self._skipped.items():
            if skipped_invoke != invoke or not _is_inside(hook, path):
                continue
            for own, source in places:
                if overlap(own, steps):
                    raise graph_error(
                        f"{hook} is never reached, because {path} is skipped",
                        hook=str(hook),
                        other=source,
                    )


def is_lost(node: Node, path: str, invoke: int) -> bool:
    """Whether a node would do nothing if a module were skipped in an invoke."""
    if not isinstance(node, ReadHook | WriteHook) or node.invoke != invoke:
        return False
    is_end = node.hook.port == "output" or isinstance(node, WriteHook)
    return (node.hook.path == path and is_end) or _is_inside(node.hook, path)


def _is_inside(hook: HookPoint, path: str) -> bool:
    """Whether a hook point comes between the input and the output of a module."""
    own = hook.path == path and (hook.operation or hook.port not in ("input", "output"))
    return bool(own) or hook.path.startswith(f"{path}.")
