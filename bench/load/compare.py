"""Two load tests side by side: what has become slower or faster at the same load."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from rich.console import Console

from bench.load.run import Level, Run, RunError
from bench.load.table import plain_table

#: What is compared: a name, the figure, and whether more of it is better.
_FIGURES: tuple[tuple[str, Callable[[Level], float | None], bool], ...] = (
    ("p50 s", lambda level: _latency(level, "p50"), False),
    ("p95 s", lambda level: _latency(level, "p95"), False),
    ("p99 s", lambda level: _latency(level, "p99"), False),
    ("req/s", lambda level: level.summary.throughput, True),
    ("good/s", lambda level: level.summary.goodput, True),
    ("groups", lambda level: level.summary.groups, True),
    ("errors", lambda level: float(level.summary.failed), False),
)

#: A difference that repeating a run of some seconds makes as well.
_NOISE = 0.1


def pairs(before: Run, after: Run) -> list[tuple[Level, Level]]:
    """Return the levels of the same load in both.

    Raises:
        RunError: there are none.
    """
    known = {level.name: level for level in before.levels}
    found = [(known[level.name], level) for level in after.levels if level.name in known]
    if not found:
        raise RunError("the two runs have no load in common: give both the same --users or --rate")
    return found


def differences(before: Run, after: Run) -> list[str]:
    """Return in what, beside the figures, the two runs differ: then they compare less."""
    found = []
    for what, one, other in (
        ("settings", before.settings, after.settings),
        ("server", before.server, after.server),
        ("machine", before.machine, after.machine),
    ):
        for field in msgspec.structs.fields(type(one)):
            old, new = getattr(one, field.name), getattr(other, field.name)
            if old != new and field.name not in ("load", "url"):
                found.append(f"{what}: {field.name} was {_words(old)}, is {_words(new)}")
    return found


def slowdown(before: Run, after: Run) -> float:
    """Return the largest ratio of p95 latencies, after to before, of the loads in common.

    Raises:
        RunError: no such ratio is known.
    """
    known = [
        new / old
        for one, other in pairs(before, after)
        if (old := _latency(one, "p95")) and (new := _latency(other, "p95")) is not None
    ]
    if not known:
        raise RunError("there is no load at which both runs have results")
    return max(known)


def print_comparison(console: Console, before: Run, after: Run) -> None:
    """Print the figures of both, load by load.

    Raises:
        RunError: the runs have no load in common.
    """
    table = plain_table(
        f"{before.date} and {after.date}",
        ("", "figure", "before", "after", "change"),
        f"changes of more than {_NOISE:.0%} are coloured; short runs vary by as much",
    )
    for one, other in pairs(before, after):
        for number, (name, figure, more_is_better) in enumerate(_FIGURES):
            old, new = figure(one), figure(other)
            words = ["-" if value is None else f"{value:.3g}" for value in (old, new)]
            first = other.name if not number else ""
            table.add_row(first, name, *words, _change(old, new, more_is_better))
    console.print(table)
    for line in differences(before, after):
        console.print(f"[yellow]{line}[/]", highlight=False)


def _change(old: float | None, new: float | None, more_is_better: bool) -> str:
    if not old or new is None:
        return ""
    change = new / old - 1
    if abs(change) <= _NOISE:
        return f"{change:+.0%}"
    colour = "green" if (change > 0) == more_is_better else "red"
    return f"[{colour}]{change:+.0%}[/]"


def _latency(level: Level, name: str) -> float | None:
    latency = level.summary.latency
    return None if latency is None else float(getattr(latency, name))


def _words(value: object) -> str:
    return msgspec.json.encode(value).decode()
