"""One user, one request after another: how long each kind of experiment takes, beside peers."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

from bench.load.scenarios import SCENARIOS, Request, Sizes, draw
from bench.measure import Figure, alternate, ratios, spread
from bench.peers.process import Answers, PeerError

#: What one request of ours may take, in times of a peer's.
TARGETS = {"nnsight": 1.1, "transformer-lens": 1.0}

#: Largest relative distance between two answers, for rounding.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


class Subject(Protocol):
    """Whatever runs rounds of requests."""

    def round(self, requests: Sequence[Request]) -> Answers:
        """Run requests one after another."""
        ...


def measure(
    ours: Subject,
    peers: Mapping[str, Subject],
    able: Mapping[str, Sequence[str]],
    sizes: Sizes,
    rounds: int,
    dtype: str,
) -> tuple[list[Figure], dict[str, object], list[str]]:
    """Run every scenario on everybody, alternately.

    Args:
        ours: our client.
        peers: the others, by name.
        able: for each scenario, which of them run it.
        sizes: requests are drawn for.
        rounds: alternations kept of each scenario.
        dtype: of the model, which decides how far answers may be apart.

    Returns:
        Figures, the seconds of every request, and why some peers have no figure.
    """
    figures: list[Figure] = []
    seen: dict[str, object] = {}
    notes: list[str] = []
    for scenario in SCENARIOS:
        subjects = {"ours": ours} | {name: peers[name] for name in able[scenario]}
        odd = _disagreeing(subjects, _requests(scenario, -100, sizes, 2), _TOLERANCE[dtype])
        notes += [f"{scenario}: {name} {why}" for name, why in odd.items()]
        agreeing = {name: one for name, one in subjects.items() if name not in odd}

        def timed(subject: Subject, number: int, scenario: str = scenario) -> float:
            return subject.round(_requests(scenario, number, sizes, 1)).seconds[0]

        seconds = alternate(
            {name: partial(timed, subject) for name, subject in agreeing.items()},
            rounds,
            warmups=2,
        )
        seen[f"{scenario}_s"] = seconds
        figures += [_figure(scenario, name, seconds) for name in agreeing if name != "ours"]
    return figures, seen, notes


def _requests(scenario: str, number: int, sizes: Sizes, count: int) -> list[Request]:
    rng = random.Random(f"{scenario} {number}")
    return [draw({scenario: 1.0}, rng, sizes) for _ in range(count)]


def _disagreeing(
    subjects: Mapping[str, Subject], requests: Sequence[Request], tolerance: float
) -> dict[str, str]:
    """Return who fails, or gives other answers than we do, and in what way."""
    odd: dict[str, str] = {}
    expected = subjects["ours"].round(requests).values
    for name, subject in subjects.items():
        try:
            found = subject.round(requests).values
        except PeerError as error:
            odd[name] = f"failed: {error}"
            continue
        if any(_distance(a, b) > tolerance for a, b in zip(found, expected, strict=True)):
            odd[name] = "gives another answer than we and the others do"
    if "ours" in odd:
        raise SystemExit(f"our own answers differ from time to time: {odd['ours']}")
    return odd


def _distance(found: Sequence[float], expected: Sequence[float]) -> float:
    if len(found) != len(expected):
        return math.inf
    return math.dist(found, expected) / max(math.hypot(*expected), 1e-30)


def _figure(scenario: str, name: str, seconds: Mapping[str, list[float]]) -> Figure:
    taken = spread(ratios(seconds["ours"], seconds[name]))
    most = TARGETS.get(name)
    return Figure(
        name=f"{scenario}, alone, beside {name}",
        meaning="time of one request of ours, through HTTP / of the same on the peer",
        unit="x",
        spread=taken,
        target=None if most is None else f"<= {most:g} x",
        met=None if most is None else taken.median <= most,
    )
