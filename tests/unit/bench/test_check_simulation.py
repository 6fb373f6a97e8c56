"""The simulation of a load test foretells what its cost says, and refuses what it can't tell."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from bench.check_simulation import check
from bench.load.run import Level, RunError
from tests.unit.bench.load_runs import level, row, run

#: Of a forward that never took place: seconds of it, of each row, and around a request.
BASE_S, ROW_S, AROUND_S = 0.02, 0.001, 0.004
TOKENS = 10


def forward_s(requests: int) -> float:
    return BASE_S + requests * TOKENS * ROW_S


def measured(users: int, together: int) -> Level:
    """Return a level whose forwards carried so many requests each."""
    took = forward_s(together)
    return level(
        [
            row(
                number * 0.1,
                took + AROUND_S,
                user=number % users,
                run_s=took,
                groups=together,
                rows=together * TOKENS,
                forward=1000 * users + number,
                forwards=1,
            )
            for number in range(20)
        ],
        users=users,
    )


def test_one_user_waits_for_his_forward_and_what_lies_around_it() -> None:
    found = check(run(measured(1, 1), measured(4, 2), measured(8, 4)), seconds=5.0)

    assert found.tokens == TOKENS
    assert found.around_s == pytest.approx(AROUND_S)
    assert found.fit.error == pytest.approx(0, abs=1e-6)
    alone = found.levels[0]
    assert alone.simulated.p50 == pytest.approx(alone.measured.p50, rel=1e-6)
    assert alone.simulated.per_s == pytest.approx(1 / alone.measured.p50, rel=0.05)


def test_users_without_pause_take_turns_in_two_groups() -> None:
    found = check(run(measured(1, 1), measured(4, 2), measured(8, 4)), seconds=5.0)

    assert [level.users for level in found.levels] == [1, 4, 8]
    assert [level.simulated.groups for level in found.levels] == pytest.approx([1, 2, 4], rel=0.1)


def test_only_a_closed_loop_of_one_scenario_is_simulated_again() -> None:
    one = run(measured(1, 1), measured(4, 2), measured(8, 4))
    for settings in (
        replace(one.settings, loop="open"),
        replace(one.settings, weights={"patching": 0.5, "steering": 0.5}),
    ):
        with pytest.raises(RunError, match="closed loop of one scenario"):
            check(replace(one, settings=settings), seconds=1.0)


def test_a_run_without_its_requests_is_refused() -> None:
    empty = replace(measured(1, 1), requests=None)
    with pytest.raises(RunError, match="without its requests"):
        check(run(empty), seconds=1.0)
