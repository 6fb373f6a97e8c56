"""What the requests of one level come to: percentiles, throughput, goodput, shared forwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from bench.load.asking import GIVEN_UP, OK, Row
from bench.load.loops import Window

#: Points of the occupancy over time that are kept.
_BINS = 40

#: Different messages of errors that are kept, the most frequent ones.
_MESSAGES = 5


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles of some seconds.

    Attributes:
        count: of how many.
        p50, p90, p95, p99: they; each is one that was seen, the next higher where it lies between.
        highest: of all.
        at_least: the part of them that was given up, so that it would have taken longer; those
            from the shortest of these on are lower bounds.
        known_to: the shortest that was given up; None if none was.
    """

    count: int
    p50: float
    p90: float
    p95: float
    p99: float
    highest: float
    at_least: float = 0.0
    known_to: float | None = None

    @classmethod
    def of(cls, seconds: Sequence[float], given_up: Sequence[float] = ()) -> Percentiles | None:
        """Return the percentiles of all of them; None if there are none.

        Args:
            seconds: of those that came to an end.
            given_up: of those that did not, until they were given up.
        """
        values = [*seconds, *given_up]
        if not values:
            return None
        # Between two that were seen nothing was seen, and between one that ended and one that was
        # given up a mean would mean nothing.
        found = np.percentile(values, [50, 90, 95, 99], method="inverted_cdf")
        p50, p90, p95, p99 = map(float, found)
        return cls(
            count=len(values),
            p50=p50,
            p90=p90,
            p95=p95,
            p99=p99,
            highest=max(values),
            at_least=len(given_up) / len(values),
            known_to=min(given_up, default=None),
        )

    def show(self, seconds: float) -> str:
        """Return one of the percentiles in words, marked where it is only a lower bound."""
        bound = self.known_to is not None and seconds >= self.known_to
        digits = f"{seconds:.3f}" if seconds < 1 else f"{seconds:.3g}"
        return f"{'≥' if bound else ''}{digits}"


class Moment(msgspec.Struct, frozen=True):
    """A part of the level: its middle, in seconds from the start, and requests per forward."""

    at_s: float
    groups: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A level in numbers: of all requests whose intended time lies in its window.

    Those of the warm-up that were still waiting at its end are among them.

    Attributes:
        sent: how many these are.
        ok: of them, those with a result.
        errors: the others, by status.
        messages: the most frequent first lines of errors.
        latency: seconds from the intended time until the whole result is here, or they were
            given up; refused and failed ones are left out.
        by_scenario: the same for each.
        first_token: of generations, seconds from arrival at the server.
        queue, run, transfer: parts of it, see `asking.Row`.
        lag: seconds by which the harness itself was late.
        throughput: results that came within the window, a second.
        goodput: those of them whose latency was within the objective.
        attained: the part of all that were sent which had its result within the objective.
        forwards: different forwards that these requests began in.
        groups: requests in such a forward, others' included, on average.
        busy: the part of the window in which the forwards of these requests ran.
        bytes: of values received.
        curve: the latency at each percentage from 0 to 100.
        occupancy: requests in a forward, over time.
    """

    sent: int
    ok: int
    errors: dict[str, int]
    messages: dict[str, int]
    latency: Percentiles | None
    by_scenario: dict[str, Percentiles]
    first_token: Percentiles | None
    queue: Percentiles | None
    run: Percentiles | None
    transfer: Percentiles | None
    lag: Percentiles | None
    throughput: float
    goodput: float
    attained: float
    forwards: int
    groups: float
    busy: float
    bytes: int
    curve: list[float]
    occupancy: list[Moment]

    @property
    def failed(self) -> int:
        """How many had no result."""
        return self.sent - self.ok


def summarise(rows: Sequence[Row], window: Window, objective_s: float) -> Summary:
    """Return what a level comes to.

    Args:
        rows: all of its requests, those of the warm-up too.
        window: when it measured.
        objective_s: latency within which a result is good.
    """
    begin_s, end_s = window.warmup_s, window.end_s
    sent = [row for row in rows if _counts(row, window)]
    answered = [row for row in sent if row.status == OK]
    came = [row for row in rows if row.status == OK and begin_s <= row.done_s < end_s]
    failed = [row for row in sent if row.status != OK]
    good = [row for row in answered if row.latency_s <= objective_s]
    forwards = _forwards(answered)
    return Summary(
        sent=len(sent),
        ok=len(answered),
        errors=dict(Counter(row.status for row in failed)),
        messages=dict(Counter(row.error for row in failed if row.error).most_common(_MESSAGES)),
        latency=_latency(sent),
        by_scenario={
            name: found
            for name in sorted({row.scenario for row in sent})
            if (found := _latency([row for row in sent if row.scenario == name])) is not None
        },
        first_token=_of(row.first_token_s for row in answered),
        queue=_of(row.queue_s for row in answered),
        run=_of(row.run_s for row in answered),
        transfer=_of(row.transfer_s for row in answered),
        lag=_of(row.sent_s - row.intended_s for row in sent),
        throughput=len(came) / window.duration_s,
        goodput=sum(row.latency_s <= objective_s for row in came) / window.duration_s,
        attained=len(good) / len(sent) if sent else 0.0,
        forwards=len(forwards),
        groups=float(np.mean([row.groups for row in forwards])) if forwards else 0.0,
        busy=_busy(answered, window),
        bytes=sum(row.bytes for row in answered),
        curve=_curve(sent),
        occupancy=_occupancy(_forwards([row for row in rows if row.status == OK]), window),
    )


def _counts(row: Row, window: Window) -> bool:
    """Whether a request was to be sent in the window, or has waited through all of it.

    Without the second a user who is stuck since the warm-up would not be seen at all.
    """
    stuck = row.intended_s < window.warmup_s and row.done_s >= window.end_s
    return stuck or window.warmup_s <= row.intended_s < window.end_s


def _latency(rows: Sequence[Row]) -> Percentiles | None:
    return Percentiles.of(
        [row.latency_s for row in rows if row.status == OK],
        [row.latency_s for row in rows if row.status in GIVEN_UP],
    )


def _of(values: Iterable[float | None]) -> Percentiles | None:
    return Percentiles.of([value for value in values if value is not None])


def _curve(rows: Sequence[Row]) -> list[float]:
    values = [row.latency_s for row in rows if row.status in (OK, *GIVEN_UP)]
    if not values:
        return []
    found = np.percentile(values, range(101), method="inverted_cdf")
    return [round(float(value), 6) for value in found]


def _forwards(rows: Sequence[Row]) -> list[Row]:
    """Return a row for each different forward that these requests began in."""
    return list({row.forward: row for row in rows}.values())


def _busy(rows: Sequence[Row], window: Window) -> float:
    # A forward is known by its first requests only; each is counted once for all who shared it.
    # The later forwards of a generation have no numbers, and those of one that is alone in them
    # can't be told from shared ones: they are left out.
    seconds = {row.forward: row.run_s or 0.0 for row in rows if row.forwards == 1}
    return min(1.0, sum(seconds.values()) / window.duration_s)


def _occupancy(forwards: Sequence[Row], window: Window) -> list[Moment]:
    """Return the mean of requests in a forward for each part of the level that had one."""
    width = window.end_s / _BINS
    bins: dict[int, list[int]] = {}
    for row in forwards:
        if row.started_s is not None and row.started_s < window.end_s:
            bins.setdefault(int(row.started_s / width), []).append(row.groups)
    return [
        Moment(round((number + 0.5) * width, 3), float(np.mean(bins[number])))
        for number in sorted(bins)
    ]
