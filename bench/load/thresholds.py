"""What a load test must reach, so that a CI job can fail on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from bench.load.run import Level


class Thresholds(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds that every level must keep; None for none.

    Attributes:
        max_p50, max_p95, max_p99: of the latency, in seconds.
        min_throughput, min_goodput: requests a second.
        max_errors: requests without a result.
    """

    max_p50: float | None = None
    max_p95: float | None = None
    max_p99: float | None = None
    min_throughput: float | None = None
    min_goodput: float | None = None
    max_errors: int | None = None

    def missed(self, levels: Sequence[Level]) -> list[str]:
        """Return what was not met, a line each. Without any result no bound of a time is met."""
        found = []
        for level in levels:
            summary, latency = level.summary, level.summary.latency
            for name in ("p50", "p95", "p99"):
                bound: float | None = getattr(self, f"max_{name}")
                seen = math.inf if latency is None else getattr(latency, name)
                if bound is not None and seen > bound:
                    words = "no result" if latency is None else f"{name} {latency.show(seen)} s"
                    found.append(f"{level.name}: {words}, at most {bound:g} s wanted")
            for name in ("throughput", "goodput"):
                bound = getattr(self, f"min_{name}")
                rate: float = getattr(summary, name)
                if bound is not None and rate < bound:
                    found.append(f"{level.name}: {name} {rate:.3g}/s, at least {bound:g}/s wanted")
            if self.max_errors is not None and summary.failed > self.max_errors:
                found.append(
                    f"{level.name}: {summary.failed} errors, at most {self.max_errors} wanted"
                )
        return found
