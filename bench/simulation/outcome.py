"""What a simulated history comes to: waiting, throughput, fairness, and where the knee is."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from bench.simulation.world import History, Served


class Waiting(msgspec.Struct, frozen=True):
    """Percentiles of some waiting times, in seconds; NaN where nobody has waited to the end."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Waiting:
        """Return the percentiles of these."""
        if not seconds:
            return cls(*[float("nan")] * 3)
        return cls(*map(float, np.percentile(seconds, [50, 95, 99])))


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A run in numbers.

    Attributes:
        users: how many there were.
        sent, ended, refused: requests; a refused one is sent again later.
        first: from sending to the first token, or to the result of a trace.
        whole: from sending to the end.
        waiting: the same as `first`, for each kind of user.
        ended_per_s: requests ended in a second.
        good_per_s: those whose first token or result came within the objective.
        late: the part of all requests, unanswered ones included, that has waited longer.
        groups: requests in a forward, on average.
        busy: the part of the time in which a forward ran.
        fairness: Jain's index (Jain et al. 1984) of how soon users of the same kind had their
            first tokens or results: 1 if all alike, 1/n if one always and the others never.
    """

    users: int
    sent: int
    ended: int
    refused: int
    first: Waiting
    whole: Waiting
    waiting: dict[str, Waiting]
    ended_per_s: float
    good_per_s: float
    late: float
    groups: float
    busy: float
    fairness: float


def summarise(history: History, objective_s: float, warmup_s: float = 0.0) -> Outcome:
    """Return the outcome of a history, of what was sent after the warm-up."""
    sent = [one for one in history.requests if one.sent_s >= warmup_s]
    ended = [one for one in sent if one.ended_s is not None]
    span = history.duration_s - warmup_s
    good = [one for one in ended if (one.first_s or 0.0) - one.sent_s <= objective_s]
    # Who was sent just before the end, and is not late yet, says nothing.
    judged = [
        one
        for one in sent
        if one.ended_s is not None or history.duration_s - one.sent_s > objective_s
    ]
    forwards = [one for one in history.forwards if one.start_s >= warmup_s]
    groups = {one.group for one in sent}
    return Outcome(
        users=len({one.user for one in history.requests}),
        sent=len(sent),
        ended=len(ended),
        refused=sum(one.refusals for one in sent),
        first=Waiting.of(_firsts(ended)),
        whole=Waiting.of([(one.ended_s or 0.0) - one.sent_s for one in ended]),
        waiting={
            group: Waiting.of(_firsts([one for one in ended if one.group == group]))
            for group in sorted(groups)
        },
        ended_per_s=len(ended) / span,
        good_per_s=len(good) / span,
        late=1 - len(good) / len(judged) if judged else 0.0,
        groups=float(np.mean([one.load.requests for one in forwards])) if forwards else 0.0,
        busy=sum(one.seconds for one in forwards) / span,
        fairness=min((_jain(ended, group) for group in groups), default=1.0),
    )


def knee(outcomes: Sequence[Outcome], most_late: float = 0.05) -> Outcome | None:
    """Return the one with the most users before the part that is late exceeds a bound.

    Args:
        outcomes: of the same server with ever more users.
        most_late: see `Outcome.late`.

    Returns:
        None if there are too many users from the beginning.
    """
    best = None
    for outcome in sorted(outcomes, key=lambda one: one.users):
        if outcome.late > most_late:
            break
        best = outcome
    return best


def _firsts(requests: Sequence[Served]) -> list[float]:
    return [one.first_s - one.sent_s for one in requests if one.first_s is not None]


def _jain(requests: Sequence[Served], group: str) -> float:
    """Return the fairness among the users of one kind, by their mean waiting times."""
    times: dict[str, list[float]] = {}
    for one in requests:
        if one.group == group and one.first_s is not None:
            times.setdefault(one.user, []).append(one.first_s - one.sent_s)
    if not times:
        return 1.0
    rates = np.array([1 / max(float(np.mean(own)), 1e-9) for own in times.values()])
    return float(rates.sum() ** 2 / (len(rates) * (rates**2).sum()))
