"""The cost of a forward, fitted to the forwards that a load test has seen, for the simulation."""

from __future__ import annotations

import msgspec
import numpy as np

from bench.load.asking import OK, Row
from bench.load.run import Run, RunError
from bench.load.scenarios import SCENARIOS
from bench.simulation.cost import ForwardCost, Load, Sample, fit


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """A fitted cost.

    Attributes:
        cost: in seconds, see `ForwardCost`.
        forwards: measured ones that it was fitted to.
        rows, requests: smallest and largest number in one of them.
        error: median of the absolute difference to the measured time, relative to that.
    """

    cost: ForwardCost
    forwards: int
    rows: tuple[int, int]
    requests: tuple[int, int]
    error: float


def samples(run: Run) -> list[Sample]:
    """Return each forward that a run has seen once.

    Left out are generations, whose measured time is that of many forwards, and forwards with a
    backward, whose cost is another one. What others had in a forward counts with it.

    Raises:
        RunError: the run was written without its requests.
    """
    rows: list[Row] = []
    for level in run.levels:
        if level.requests is None:
            raise RunError("this run was written without its requests (--no-requests)")
        rows += level.requests
    return [
        Sample(Load(rows=row.rows, requests=row.groups), row.run_s)
        for row in {row.forward: row for row in rows if _is_plain(row)}.values()
        if row.run_s is not None
    ]


def fit_run(run: Run) -> Fit:
    """Fit the cost of a forward to a run.

    Raises:
        RunError: it has seen too few forwards, or too equal ones.
    """
    measured = samples(run)
    try:
        cost = fit(measured)
    except ValueError as error:
        raise RunError(f"nothing can be fitted: {error}") from None
    apart = [abs(cost.seconds(one.load) - one.seconds) / one.seconds for one in measured]
    rows = [one.load.rows for one in measured]
    requests = [one.load.requests for one in measured]
    return Fit(
        cost=cost,
        forwards=len(measured),
        rows=(min(rows), max(rows)),
        requests=(min(requests), max(requests)),
        error=float(np.median(apart)),
    )


def _is_plain(row: Row) -> bool:
    scenario = SCENARIOS.get(row.scenario)
    differentiates = scenario is not None and scenario.differentiates
    return row.status == OK and row.forwards == 1 and not differentiates
