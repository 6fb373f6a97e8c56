"""Restarts back off and end when they happen too often."""

from __future__ import annotations

from ndif_actor.actor.supervisor import RestartPolicy


def test_the_delay_doubles_up_to_its_limit() -> None:
    policy = RestartPolicy(max_restarts=6, first_delay_s=1.0, max_delay_s=8.0)

    assert [policy.next_delay(0.0) for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_too_many_restarts_within_the_window_end_it() -> None:
    policy = RestartPolicy(max_restarts=2, window_s=60.0)
    policy.next_delay(0.0)
    policy.next_delay(1.0)

    assert policy.next_delay(2.0) is None


def test_restarts_long_ago_are_forgiven() -> None:
    policy = RestartPolicy(max_restarts=1, window_s=60.0, first_delay_s=0.5)
    policy.next_delay(0.0)

    assert policy.next_delay(61.0) == 0.5
