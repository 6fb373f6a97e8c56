"""Many users who ask without pause: throughput and waiting, beside those that serve one by one."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

from bench.load.scenarios import Request, Sizes, draw
from bench.measure import Figure, alternate, ratios, spread
from bench.peers.process import Crowd

#: Of the NDIF paper's scenario at 32 users, beside NDIF's floor: throughput at least, p95 at most.
_THROUGHPUT, _P95 = 6.0, 0.2
_JUDGED = "ndif-floor"

#: Requests of its own that each user goes through again and again.
_OWN = 16


class Subject(Protocol):
    """Whatever serves users."""

    def crowd(self, requests: Sequence[Sequence[Request]], seconds: float) -> Crowd:
        """Let users ask without pause."""
        ...


def measure(
    subjects: Mapping[str, Subject],
    scenario: str,
    sizes: Sizes,
    *,
    users: int,
    seconds: float,
    rounds: int,
) -> tuple[list[Figure], dict[str, object]]:
    """Let the same users ask ours and the others, alternately.

    Args:
        subjects: "ours" and peers, by name.
        scenario: what they ask for.
        sizes: requests are drawn for.
        users: how many ask at the same time.
        seconds: for how long, in each round.
        rounds: alternations kept.
    """

    def serve(subject: Subject, number: int) -> Crowd:
        rng = random.Random(f"crowd {number}")
        wanted = [[draw({scenario: 1.0}, rng, sizes) for _ in range(_OWN)] for _ in range(users)]
        return subject.crowd(wanted, seconds)

    seen = alternate(
        {name: partial(serve, subject) for name, subject in subjects.items()},
        rounds,
    )
    rates = {name: [len(c.latencies) / c.seconds for c in crowds] for name, crowds in seen.items()}
    waits = {name: [_p95(c.latencies) for c in crowds] for name, crowds in seen.items()}
    figures: list[Figure] = []
    for name in subjects:
        if name == "ours":
            continue
        gain, wait = (spread(ratios(of["ours"], of[name])) for of in (rates, waits))
        judged = name == _JUDGED
        figures.append(
            Figure(
                name=f"{scenario}, {users} users, throughput beside {name}",
                meaning="requests a second of ours / of the peer's",
                unit="x",
                spread=gain,
                target=f">= {_THROUGHPUT:g} x" if judged else None,
                met=gain.median >= _THROUGHPUT if judged else None,
            )
        )
        figures.append(
            Figure(
                name=f"{scenario}, {users} users, p95 beside {name}",
                meaning="95th percentile of waiting, of ours / of the peer's",
                unit="x",
                spread=wait,
                target=f"<= {_P95:g} x" if judged else None,
                met=wait.median <= _P95 if judged else None,
            )
        )
    observed: dict[str, object] = {"requests_per_s": rates, "p95_s": waits}
    return figures, observed


def _p95(latencies: Sequence[float]) -> float:
    return statistics.quantiles(latencies, n=20, method="inclusive")[-1]
