"""How far a trace is: a record for callbacks, and a line on the terminal when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import rich.progress


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of a trace.

    Attributes:
        id: the trace's.
        state: "queued", "running", "generating", "done" or "failed".
        position: while queued, how many requests will start before it.
        groups: while running, how many requests share its forward.
        elapsed_s: seconds since it was submitted.
        tokens: while generating, how many tokens all its sequences have got so far.
    """

    id: str
    state: Literal["queued", "running", "generating", "done", "failed"]
    position: int | None = None
    groups: int | None = None
    elapsed_s: float = 0.0
    tokens: int | None = None


OnProgress = Callable[[Progress], object]


class ProgressDisplay:
    """Shows one line for each trace that is under way; nothing before the first."""

    def __init__(self) -> None:
        self._bars: rich.progress.Progress | None = None
        self._tasks: dict[str, rich.progress.TaskID] = {}

    def show(self, progress: Progress) -> None:
        """Show a step; the display ends with its last trace."""
        bars = self._bars or self._start()
        if progress.id not in self._tasks:
            self._tasks[progress.id] = bars.add_task(progress.id[:8], total=1)
        ended = progress.state in ("done", "failed")
        bars.update(
            self._tasks[progress.id],
            description=f"trace {progress.id[:8]}  {_words(progress)}",
            completed=1 if ended else 0,
        )
        if ended:
            del self._tasks[progress.id]
        if not self._tasks:
            self.close()

    def close(self) -> None:
        """Take the display off the terminal; finished lines stay."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._tasks.clear()

    def _start(self) -> rich.progress.Progress:
        from rich.console import Console
        from rich.progress import Progress as Bars
        from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._bars.start()
        return self._bars


def _words(progress: Progress) -> str:
    if progress.state == "queued":
        return "queued" if progress.position is None else f"queued, {progress.position} before it"
    if progress.state == "running":
        others = (progress.groups or 1) - 1
        return "running" if others == 0 else f"running, shared with {others}"
    if progress.state == "generating" and progress.tokens is not None:
        return f"generating, {progress.tokens} token{'s' if progress.tokens != 1 else ''}"
    return progress.state
