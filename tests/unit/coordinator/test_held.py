"""What is held for whom: who sees it, what it costs, when it goes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndif_actor.coordinator.held import LEAST_BYTES, HeldLimits, HeldRegistry
from ndif_actor.errors import RequestError
from ndif_actor.messages import Dropped, Settle
from ndif_client.wire.messages import HeldSpec
from ndif_client.wire.tensors import TensorSpec

MB = 1_000_000


def registry(user_bytes: int = 10 * MB, total_bytes: int = 100 * MB) -> HeldRegistry:
    return HeldRegistry(HeldLimits(user_bytes=user_bytes, total_bytes=total_bytes, idle_s=100.0))


def size(nbytes: int) -> TensorSpec:
    return TensorSpec("uint8", (nbytes,))


def keep(held: HeldRegistry, request: str, user: str = "ann", **values: HeldSpec) -> str:
    """Let a request keep values, and end well."""
    scope = held.reserve(request, user, "session-1", values, 0.0)
    held.commit(request, values)
    held.release(request, 0.0)
    return scope


def test_of_what_a_generation_reserves_only_that_is_held_which_it_has_kept() -> None:
    held = registry()
    held.reserve("a", "ann", "session-1", {"early": size(MB), "late": size(MB)}, 0.0)

    held.commit("a", ["early"])
    held.release("a", 0.0)

    assert set(held.known("ann", "session-1", 0.0).held) == {"early"}
    assert held.held_bytes("ann") == MB
    assert held.take_changes() == Settle(["a"], [])
    held.reserve("b", "ann", "session-1", {"late": size(MB)}, 0.0)
    held.commit("b", [])
    held.release("b", 0.0)
    assert held.take_changes() is None


def test_what_a_request_keeps_is_known_when_it_has_ended_well() -> None:
    held = registry()
    scope = held.reserve("a", "ann", "session-1", {"w": size(MB)}, 0.0)
    assert held.known("ann", "session-1", 0.0).held == {}

    held.commit("a", ["w"])
    held.release("a", 0.0)

    assert held.known("ann", "session-1", 0.0).held == {"w": size(MB)}
    assert held.take_changes() == Settle(["a"], [])
    assert held.take_changes() is None
    assert keep(held, "b", w=size(5)) == scope


def test_a_request_that_fails_changes_nothing() -> None:
    held = registry()
    keep(held, "a", w=size(MB))
    held.reserve("b", "ann", "session-1", {"w": size(9 * MB), "v": size(10)}, 0.0)
    held.release("b", 0.0)

    assert held.known("ann", "session-1", 0.0).held == {"w": size(MB)}
    assert held.held_bytes("ann") == MB
    assert held.take_changes() == Settle(["a"], [])


def test_users_and_sessions_do_not_see_each_other() -> None:
    held = registry()
    mine = keep(held, "a", "ann", w=size(MB))
    other = held.reserve("b", "ann", "session-2", {"w": size(1)}, 0.0)
    his = held.reserve("c", "bob", "session-1", {"w": size(1)}, 0.0)

    assert len({mine, other, his}) == 3
    assert held.known("bob", "session-1", 0.0).held == {}
    assert held.drop("bob", "session-1", ["w"], 0.0) == {}
    assert held.known("ann", "session-1", 0.0).held == {"w": size(MB)}


def test_bytes_are_reserved_before_anything_runs() -> None:
    held = registry(user_bytes=2 * MB)
    held.reserve("a", "ann", "session-1", {"w": size(1_500_000)}, 0.0)

    with pytest.raises(RequestError, match=r"'v' would make 2100000 bytes .* allows 2000000"):
        held.reserve("b", "ann", "session-2", {"v": size(600_000)}, 0.0)
    held.reserve("b", "bob", "session-2", {"v": size(600_000)}, 0.0)


def test_all_users_together_have_a_bound_too() -> None:
    held = registry(total_bytes=2 * MB)
    keep(held, "a", w=size(1_500_000))

    with pytest.raises(RequestError, match="for all users"):
        held.reserve("b", "bob", "session-1", {"v": size(600_000)}, 0.0)


def test_values_that_replace_each_other_count_once() -> None:
    held = registry(user_bytes=2 * MB)
    for number in range(10):
        held.reserve(f"r{number}", "ann", "session-1", {"w": size(MB + number)}, 0.0)
    assert held.held_bytes("ann") == MB + 9

    for number in range(10):
        held.commit(f"r{number}", ["w"])
        held.release(f"r{number}", 0.0)
    assert held.held_bytes("ann") == MB + 9


def test_even_an_empty_value_counts() -> None:
    held = registry()
    keep(held, "a", w=size(0), pair=[size(1), size(2)])

    assert held.held_bytes("ann") == 2 * LEAST_BYTES


def test_dropping_frees_and_tells_the_shards_after_what_was_kept() -> None:
    held = registry()
    scope = keep(held, "a", w=size(MB), v=size(MB))

    assert held.drop("ann", "session-1", ["w", "nothing"], 0.0) == {"w": size(MB)}
    assert held.take_changes() == Settle(["a"], [Dropped(scope, ["w"])])
    assert held.held_bytes("ann") == MB
    assert held.drop_session("ann", "session-1")
    assert not held.drop_session("ann", "session-1")
    assert held.take_changes() == Settle([], [Dropped(scope)])
    assert held.held_bytes() == 0


def test_what_a_dropped_session_was_about_to_keep_is_not_kept() -> None:
    held = registry()
    held.reserve("a", "ann", "session-1", {"w": size(MB)}, 0.0)
    held.drop_session("ann", "session-1")
    held.take_changes()
    fresh = held.reserve("b", "ann", "session-1", {"w": size(10)}, 0.0)

    held.commit("a", ["w"])
    held.release("a", 0.0)

    assert held.take_changes() is None
    assert held.held_bytes("ann") == LEAST_BYTES
    assert keep(held, "c", w=size(1)) == fresh


def test_idle_sessions_are_dropped_and_busy_ones_are_not() -> None:
    held = registry()
    keep(held, "a", w=size(MB))
    held.reserve("b", "bob", "session-1", {"w": size(MB)}, 0.0)
    held.known("ann", "session-1", 50.0)

    held.expire(120.0)
    assert held.held_bytes() == 2 * MB
    held.expire(150.0)
    assert (held.held_bytes("ann"), held.held_bytes("bob")) == (0, MB)
    assert held.known("ann", "session-1", 150.0).lost == frozenset()


def test_a_lost_replica_loses_everything_and_it_is_remembered_what() -> None:
    held = registry()
    keep(held, "a", w=size(MB), v=size(MB))
    held.reserve("queued", "ann", "session-1", {"later": size(500)}, 0.0)

    held.lose_all()

    known = held.known("ann", "session-1", 0.0)
    assert (known.held, known.lost) == ({}, {"w", "v"})
    assert held.take_changes() is None
    assert held.held_bytes("ann") == LEAST_BYTES
    held.commit("queued", ["later"])
    held.release("queued", 0.0)
    keep(held, "b", w=size(1))
    assert held.known("ann", "session-1", 0.0).lost == {"v"}
    assert held.take_changes() == Settle(["queued", "b"], [])


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["reserve", "commit", "release", "drop", "drop_session", "lose"]),
            st.integers(0, 5),
            st.sampled_from("uvw"),
            st.integers(0, 3 * MB),
        ),
        max_size=40,
    )
)
def test_the_count_of_bytes_never_drifts(steps: list[tuple[str, int, str, int]]) -> None:
    held = registry()
    open_requests: dict[str, str] = {}
    for what, number, name, nbytes in steps:
        request, user = f"r{number}", "ann" if number % 2 else "bob"
        if what == "reserve" and request not in open_requests:
            try:
                held.reserve(request, user, "session-1", {name: size(nbytes)}, 0.0)
            except RequestError:
                continue
            open_requests[request] = name
        elif what == "commit" and request in open_requests:
            held.commit(request, [open_requests[request]] if nbytes % 2 else [])
        elif what == "release":
            held.release(request, 0.0)
            open_requests.pop(request, None)
        elif what == "drop":
            held.drop(user, "session-1", [name], 0.0)
        elif what == "drop_session":
            held.drop_session(user, "session-1")
        elif what == "lose":
            held.lose_all()
        assert 0 <= held.held_bytes(user) <= 10 * MB
    for request in open_requests:
        held.release(request, 0.0)
    for user in ("ann", "bob"):
        held.drop(user, "session-1", "uvw", 0.0)
    assert held.held_bytes() == 0
