"""Measuring side by side: alternating runs, and ratios with their spread.

A machine drifts (other users, clock speed, caches), so two things are compared only within one
round, where each ran right after the other; the figure is the median over rounds. Owns no clock of
its own and writes nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec

_T = TypeVar("_T")


class Spread(msgspec.Struct, frozen=True):
    """How one figure varied over the rounds: median, quartiles and extremes."""

    rounds: int
    median: float
    lower_quartile: float
    upper_quartile: float
    lowest: float
    highest: float


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One measured number.

    Attributes:
        name: of the figure within its benchmark.
        meaning: what was divided by, or subtracted from, what.
        unit: "x" for ratios, "ms", "MB/s" (10**6 bytes), ...
        target: what it is meant to reach, in words, if anything.
        met: whether its median does.
    """

    name: str
    meaning: str
    unit: str
    spread: Spread
    target: str | None = None
    met: bool | None = None


def alternate(
    subjects: Mapping[str, Callable[[int], _T]], rounds: int, warmups: int = 1
) -> dict[str, list[_T]]:
    """Run all subjects once a round, in an order that turns around every round.

    Args:
        subjects: each is given the number of the round, so that all can do the same work.
        rounds: how many are kept, at least 1.
        warmups: rounds before those, whose results are dropped.

    Returns:
        What each subject returned, round by round.
    """
    results: dict[str, list[_T]] = {name: [] for name in subjects}
    for number in range(-warmups, rounds):
        names = list(subjects) if number % 2 == 0 else list(subjects)[::-1]
        for name in names:
            result = subjects[name](number)
            if number >= 0:
                results[name].append(result)
    return results


def spread(values: Sequence[float]) -> Spread:
    """Return median, quartiles and extremes of at least one value."""
    ordered = sorted(values)
    median = statistics.median(ordered)
    lower = upper = median
    if len(ordered) > 1:
        lower, _, upper = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(len(ordered), median, lower, upper, ordered[0], ordered[-1])


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Divide two series round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def differences(left: Sequence[float], right: Sequence[float]) -> list[float]:
    """Subtract two series round by round."""
    return [a - b for a, b in zip(left, right, strict=True)]


def scaled(values: Sequence[float], factor: float) -> list[float]:
    """Multiply a series, to change its unit."""
    return [value * factor for value in values]
