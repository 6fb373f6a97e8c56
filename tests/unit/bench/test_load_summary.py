"""The figures of a load test say what happened, and hide nothing that went wrong."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.load.asking import Row
from bench.load.summary import Percentiles, summarise
from tests.unit.bench.load_runs import WINDOW, row

SECONDS = st.floats(0, 1e4, allow_nan=False)
ROWS = st.lists(
    st.builds(
        row,
        st.floats(0, 12, allow_nan=False),
        st.floats(0, 20, allow_nan=False),
        status=st.sampled_from(["ok", "ok", "refused", "timeout", "unfinished", "execution"]),
        forward=st.integers(1, 5),
        groups=st.integers(1, 8),
        forwards=st.just(1),
    )
)


@settings(deadline=None)
@given(st.lists(SECONDS, min_size=1))
def test_at_least_the_promised_part_is_within_a_percentile_and_it_was_seen(
    seconds: list[float],
) -> None:
    found = Percentiles.of(seconds)

    assert found is not None
    for part, value in ((0.5, found.p50), (0.9, found.p90), (0.95, found.p95), (0.99, found.p99)):
        assert value in seconds
        assert sum(each <= value for each in seconds) >= math.floor(part * len(seconds))
        assert sum(each < value for each in seconds) <= math.ceil(part * len(seconds))
    assert found.p50 <= found.p90 <= found.p95 <= found.p99 <= found.highest == max(seconds)


@settings(deadline=None)
@given(ROWS, st.floats(0.01, 20))
def test_goodput_is_part_of_throughput_and_nothing_is_lost(
    rows: list[Row], objective_s: float
) -> None:
    found = summarise(rows, WINDOW, objective_s)

    in_window = [each for each in rows if each.intended_s < WINDOW.end_s]
    assert found.sent == len(in_window) == found.ok + sum(found.errors.values())
    assert 0 <= found.goodput <= found.throughput
    assert found.throughput * WINDOW.duration_s <= len(rows)
    assert 0 <= found.attained <= 1
    assert summarise(rows, WINDOW, 1e9).goodput == found.throughput


def test_waiting_counts_from_when_a_request_was_to_be_sent() -> None:
    late = row(1.0, 3.0, sent_s=3.9)  # the harness got to it just before the answer came

    found = summarise([late], WINDOW, objective_s=2.0)

    assert found.latency is not None and found.lag is not None
    assert found.latency.p50 == 3.0
    assert found.lag.p50 == pytest.approx(2.9)
    assert found.goodput == 0


def test_what_was_given_up_counts_as_a_lower_bound_and_is_marked() -> None:
    rows = [row(0.0, 1.0), row(0.0, 2.0), row(0.0, 15.0, status="unfinished")]

    found = summarise(rows, WINDOW, objective_s=2.0).latency

    assert found is not None
    assert (found.p50, found.p99) == (2.0, 15.0)
    assert found.show(found.p50) == "2"
    assert found.show(found.p99) == "≥15"


def test_quick_refusals_do_not_make_a_server_look_quick() -> None:
    rows = [row(0.0, 5.0), *(row(0.0, 0.001, status="refused") for _ in range(9))]

    found = summarise(rows, WINDOW, objective_s=2.0)

    assert found.latency is not None and found.latency.p50 == 5.0
    assert found.errors == {"refused": 9}
    assert found.attained == 0


def test_the_warm_up_is_not_counted() -> None:
    window = type(WINDOW)(warmup_s=2.0, duration_s=10.0, drain_s=5.0, timeout_s=60.0)
    rows = [row(1.0, 0.5), row(1.5, 1.5), row(3.0, 0.5), row(11.9, 3.0), row(13.0, 0.1)]

    found = summarise(rows, window, objective_s=2.0)

    assert found.sent == 2  # intended at 3 and 11.9
    assert found.throughput == pytest.approx(0.2)  # came at 3 (from the warm-up) and at 3.5
    assert found.latency is not None and found.latency.highest == pytest.approx(3.0)


def test_a_user_who_is_stuck_since_the_warm_up_is_not_left_out() -> None:
    window = type(WINDOW)(warmup_s=2.0, duration_s=10.0, drain_s=5.0, timeout_s=60.0)

    found = summarise([row(0.5, 13.0), row(0.6, 16.4, status="unfinished")], window, 2.0)

    assert (found.sent, found.attained, found.throughput) == (2, 0.0, 0.0)
    assert found.latency is not None and found.latency.p50 == 13.0


def test_a_forward_that_many_share_is_counted_once() -> None:
    shared = [row(0.0, 1.0, forward=7, groups=4, forwards=1, run_s=0.5) for _ in range(4)]
    alone = row(1.0, 1.0, forward=8, groups=1, forwards=1, run_s=0.5)

    found = summarise([*shared, alone], WINDOW, objective_s=2.0)

    assert (found.forwards, found.groups) == (2, 2.5)
    assert found.busy == pytest.approx(0.1)


def test_a_load_without_any_request_has_a_summary() -> None:
    found = summarise([], WINDOW, objective_s=2.0)

    assert found.latency is None
    assert (found.sent, found.throughput, found.curve) == (0, 0.0, [])
