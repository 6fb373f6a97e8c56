"""How well the simulation foretells a load test: the same users, on the cost fitted to that test.

    ndif-actor-bench load URL --scenario patching --users 1,2,4,8,16,32 --out run.json
    python -m bench.check_simulation run.json

The cost of a forward is fitted to the forwards of the test, and what lies around a request to the
requests of its first level; then the server's own scheduler is given as many users on a virtual
clock. Where both columns agree, what the simulation tells of loads that nobody could try on this
machine is worth something; where they don't, a cost is missing in it.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from bench.load.asking import OK, Row
from bench.load.fitting import Fit, fit_run
from bench.load.run import Level, Run, RunError, read_run
from bench.simulation.outcome import summarise
from bench.simulation.workload import Kind, Prices, User
from bench.simulation.world import Server, simulate
from ndif_actor.config import ServerConfig
from ndif_actor.coordinator import events

_KIND, _USER = "measured", "user"

#: Seconds that the simulation takes to forget how it began.
_WARMUP_S = 2.0

#: Of what lies around a request, what the server does for one after the other, at most.
_ADMISSION_S = 0.002


class Seen(msgspec.Struct, frozen=True):
    """A level in numbers: seconds of waiting, requests a second, and requests in a forward."""

    p50: float
    p95: float
    per_s: float
    groups: float


class Compared(msgspec.Struct, frozen=True):
    """What was measured at a level, and what the simulation says."""

    users: int
    measured: Seen
    simulated: Seen


class Check(msgspec.Struct, frozen=True):
    """All levels, and what the simulation was given."""

    run: str
    fit: Fit
    around_s: float
    tokens: int
    levels: list[Compared]


def main(
    run: Annotated[Path, typer.Argument(help="A closed loop of one scenario, with its requests.")],
    seconds: Annotated[float, typer.Option(help="Simulated at each level.")] = 60.0,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Simulate a load test that was run, and show both."""
    try:
        found = check(read_run(run), seconds)
    except RunError as error:
        raise typer.BadParameter(str(error)) from None
    _show(found)
    if out is not None:
        out.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")


def check(run: Run, seconds: float) -> Check:
    """Simulate every level of a run.

    Args:
        run: a closed loop of one scenario whose requests take one forward each.
        seconds: simulated at each level.

    Raises:
        RunError: it is another kind of run, or too little of one.
    """
    if run.settings.loop != "closed" or len(run.settings.weights) != 1:
        raise RunError("only a closed loop of one scenario can be simulated again")
    fitted = fit_run(run)
    first = _plain(run.levels[0])
    if not first:
        raise RunError("its first level has no request that took one forward")
    # Between two requests of one user alone, nothing but that request is under way.
    around_s = statistics.median(row.latency_s - (row.run_s or 0.0) for row in first)
    tokens = round(statistics.median(row.rows / row.groups for row in first))
    server = _server(fitted, around_s)
    return Check(
        run=run.date,
        fit=fitted,
        around_s=around_s,
        tokens=tokens,
        levels=[_compared(level, server, tokens, run, seconds) for level in run.levels],
    )


def _plain(level: Level) -> list[Row]:
    return [row for row in level.requests or [] if row.status == OK and row.forwards == 1]


def _server(fitted: Fit, around_s: float) -> Server:
    defaults = ServerConfig(model="simulated")
    before_s = min(around_s / 2, _ADMISSION_S)
    return Server(
        cost=fitted.cost,
        budget=events.Budget(defaults.max_pass_tokens, defaults.max_pass_bytes),
        limits=events.QueueLimits(),
        num_pages=1,
        admission_s=before_s,
        reply_s=around_s - before_s,
    )


def _compared(level: Level, server: Server, tokens: int, run: Run, seconds: float) -> Compared:
    summary = level.summary
    assert summary.latency is not None, "requests of a level have their waiting"
    kind = Kind(name=_KIND, median_tokens=tokens, spread=0.0)
    user = User(name=_USER, mix={_KIND: 1.0}, think_s=run.settings.think_s)
    prices = Prices({_KIND: {tokens: events.Ticket("", tokens)}})
    history = simulate(
        server,
        prices,
        [kind],
        [(user, level.users)],
        duration_s=_WARMUP_S + seconds,
        seed=run.settings.seed,
    )
    outcome = summarise(history, run.settings.slo_s, _WARMUP_S)
    return Compared(
        users=level.users,
        measured=Seen(summary.latency.p50, summary.latency.p95, summary.throughput, summary.groups),
        simulated=Seen(outcome.whole.p50, outcome.whole.p95, outcome.ended_per_s, outcome.groups),
    )


def _show(found: Check) -> None:
    console = Console()
    cost = found.fit.cost
    console.print(
        f"a forward takes {1000 * cost.base_s:.1f} ms, {1000 * cost.row_s:.2f} ms for each row and "
        f"{1000 * cost.request_s:.2f} ms for each request (median error {found.fit.error:.0%}); "
        f"{1000 * found.around_s:.1f} ms lie around a request of {found.tokens} rows"
    )
    table = Table(title="measured, and simulated", title_justify="left")
    for column in ("users", "p50", "", "p95", "", "req/s", "", "requests in a forward", ""):
        table.add_column(column, justify="right")
    for level in found.levels:
        cells = [
            f"{number:.3g}"
            for pair in zip(
                msgspec.structs.astuple(level.measured),
                msgspec.structs.astuple(level.simulated),
                strict=True,
            )
            for number in pair
        ]
        table.add_row(str(level.users), *cells)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
