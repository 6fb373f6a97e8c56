"""A load test as tables: a row for each load, then what became of each kind of request."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.load.run import Level, Run, load_name
from bench.load.summary import Percentiles

#: Above this part of one core, or so many seconds late, it is the harness that was slow.
_BUSY, _LATE_S = 0.8, 0.1

#: Cores; more than this is not only the system's own.
_NOISY = 0.25

_LATENCY = ("p50", "p90", "p95", "p99")
_COLUMNS = (*_LATENCY, "req/s", "good/s", "SLO", "errors", "forwards", "groups")

#: Columns of words.
_WORDS = ("scenario", "figure")

PARTS = ("", "queue", "p95", "run", "p95", "transfer", "p95", "late", "harness CPU", "MB")


def headings(run: Run) -> list[str]:
    """Return the columns' names of the main table."""
    return ["users" if run.settings.loop == "closed" else "rate", *_COLUMNS]


def cells(level: Level) -> list[str]:
    """Return the row of a level; a latency that is only a lower bound has a "≥"."""
    found = level.summary
    return [
        str(level.users) if level.rate is None else load_name(level.users, level.rate),
        *_percentiles(found.latency),
        f"{found.throughput:.3g}",
        f"{found.goodput:.3g}",
        f"{found.attained:.0%}",
        str(found.failed),
        str(found.forwards),
        f"{found.groups:.1f}",
    ]


def parts(level: Level) -> list[str]:
    """Return the row of a level in the table of `PARTS`, which tells where the time went."""
    found = level.summary
    row = [level.name]
    for part in (found.queue, found.run, found.transfer):
        row += ["-", "-"] if part is None else [_ms(part.p50), _ms(part.p95)]
    late = "-" if found.lag is None else _ms(found.lag.p99)
    return [*row, late, f"{level.harness_cpu:.0%}", f"{found.bytes / 1e6:.3g}"]


def title(run: Run) -> str:
    """Return what was tested, in a line."""
    settings, server = run.settings, run.server
    what = settings.recording or ", ".join(
        name if weight == 1 else f"{name} {weight:.0%}" for name, weight in settings.weights.items()
    )
    return f"{what} on {server.model} ({server.dtype}, {server.device}), {settings.loop} loop"


def caption(run: Run) -> str:
    """Return how the main table is to be read."""
    return (
        "latency in seconds, from the intended time until the whole result is there; good: within "
        f"{run.settings.slo_s:g} s; groups: requests in a forward"
    )


#: How the table of `PARTS` is to be read.
PARTS_CAPTION = (
    "where the milliseconds went, medians and p95: until the forward and in it, by the server; "
    "from its end to the whole result; p99 of how late the harness sent; the core it took"
)


def warnings(run: Run) -> list[str]:
    """Return why figures of a run may not be the server's."""
    found = []
    for level in run.levels:
        lag = level.summary.lag
        if level.harness_cpu > _BUSY:
            found.append(
                f"{level.name}: the harness used {level.harness_cpu:.0%} of a core, so it may be "
                "what was slow; run several on other machines"
            )
        elif lag is not None and lag.p99 > _LATE_S:
            found.append(f"{level.name}: the harness sent up to {lag.p99:.2g} s late (p99)")
        if level.busy_before is not None and level.busy_before > _NOISY:
            found.append(
                f"{level.name}: something else used {level.busy_before:.1f} cores of this machine "
                "just before; if the server is on it, repeat this"
            )
        errors = [f"{count} {status}" for status, count in level.summary.errors.items()]
        if errors:
            found.append(f"{level.name}: without a result {', '.join(errors)}")
        for message, count in level.summary.messages.items():
            found.append(f"{level.name}: {count} x {message}")
    return found


def print_run(console: Console, run: Run) -> None:
    """Print the tables of a run, and what is to be said about its figures."""
    main = plain_table(title(run), headings(run), caption(run))
    where = plain_table("", PARTS, PARTS_CAPTION)
    each = plain_table(
        "", ("", "scenario", "requests", *_LATENCY), "latency by scenario, in seconds"
    )
    for level in run.levels:
        main.add_row(*cells(level))
        where.add_row(*parts(level))
        for name, found in level.summary.by_scenario.items():
            each.add_row(level.name, name, str(found.count), *_percentiles(found))
    console.print(main)
    console.print(where)
    if any(len(level.summary.by_scenario) > 1 for level in run.levels):
        console.print(each)
    for warning in warnings(run):
        console.print(f"[yellow]{escape(warning)}[/]", highlight=False)


def plain_table(name: str, columns: Sequence[str], caption: str) -> Table:
    """Return an empty table that fits a narrow terminal; numbers to the right."""
    table = Table(
        title=name or None,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in columns:
        table.add_column(column, justify="left" if column in _WORDS else "right")
    return table


def _percentiles(found: Percentiles | None) -> list[str]:
    if found is None:
        return ["-"] * 4
    return [found.show(seconds) for seconds in (found.p50, found.p90, found.p95, found.p99)]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"
