"""How far a load test is: a line that moves on a terminal, a line for each level elsewhere."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bench.load.asking import OK, Log
from bench.load.loops import Window
from bench.load.run import Level, load_name

#: Seconds between two looks.
_TICK_S = 0.25

#: Seconds that the rate shown is a mean of.
_LATELY_S = 2.0


class Display:
    """Shows a load test while it runs, on stderr.

    Args:
        console: to write to; a moving line is drawn only where it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[state]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    async def follow(self, users: int, rate: float | None, window: Window, log: Log) -> NoReturn:
        """Show one level until cancelled."""
        task = self._bars.add_task(load_name(users, rate), total=window.end_s, state="")
        try:
            while True:
                self._update(task, window, log)
                await asyncio.sleep(_TICK_S)
        finally:
            self._bars.remove_task(task)

    def ended(self, level: Level) -> None:
        """Say what a level came to."""
        found = level.summary
        latency = found.latency
        seconds = "no result" if latency is None else f"p50 {latency.show(latency.p50)} s"
        self._console.print(
            f"{level.name}: {found.sent} requests, {seconds}, {found.throughput:.3g}/s"
            + (f", [red]{found.failed} failed[/]" if found.failed else ""),
            highlight=False,
        )

    def _update(self, task: TaskID, window: Window, log: Log) -> None:
        now = log.now()
        phase = "warm-up" if now < window.warmup_s else "measures"
        if now > window.end_s:
            phase = "waits for the last"
        lately, failed = 0, 0
        for row in reversed(log.rows):
            if row.done_s < now - _LATELY_S:
                break
            lately += row.status == OK
            failed += row.status != OK
        state = (
            f"{phase}: {len(log.rows)} ended, {log.in_flight} under way, "
            f"{lately / min(max(now, _TICK_S), _LATELY_S):.1f}/s"
        )
        state += f", [red]{failed} failed lately[/]" if failed else ""
        self._bars.update(task, completed=min(now, window.end_s), state=state)
