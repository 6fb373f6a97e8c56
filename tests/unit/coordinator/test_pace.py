"""Advice follows the pace, within bounds."""

from __future__ import annotations

from ndif_actor.coordinator.pace import MAX_LINGER_S, MAX_WAIT_S, MIN_WAIT_S, Pace


def test_nothing_is_known_before_the_first_forward() -> None:
    pace = Pace()

    assert pace.wait_s(1000) == MIN_WAIT_S
    assert pace.linger_s() == 0


def test_the_wait_is_for_half_of_the_queue() -> None:
    pace = Pace()
    pace.note(groups=10, pass_s=1.0)

    assert pace.wait_s(100) == 5.0
    assert pace.wait_s(1) == MIN_WAIT_S
    assert pace.wait_s(10**6) == MAX_WAIT_S


def test_lingering_never_costs_more_than_a_forward() -> None:
    fast, slow = Pace(), Pace()
    fast.note(groups=1, pass_s=0.004)
    slow.note(groups=1, pass_s=4.0)

    assert fast.linger_s() == 0.004
    assert slow.linger_s() == MAX_LINGER_S
