"""Kept results: for whom, for how long, and when their memory goes back."""

from __future__ import annotations

import pytest

from ndif_actor.coordinator.results import RECORD_BYTES, Memory, Outgoing, ResultStore
from ndif_client.wire.messages import Failed, Fault, Queued


class Slab:
    def __init__(self) -> None:
        self.given_back = 0
        self.memory = Memory(1, self._give_back)

    def _give_back(self) -> None:
        self.given_back += 1


def result(name: str, nbytes: int = 0, memory: Memory | None = None) -> Outgoing:
    event = Failed(name, Fault(kind="internal", message="stands for any result"))
    memories = () if memory is None else (memory,)
    return Outgoing(event=event, buffers=[memoryview(bytes(nbytes))], memories=memories)


def store(room_for: int = 1000) -> ResultStore:
    return ResultStore(ttl_s=600, max_bytes=room_for * RECORD_BYTES)


def test_a_result_is_found_by_its_owner_alone() -> None:
    results = store()
    results.put("ann", result("a"), now=0)

    assert results.get("a", "ann") is not None
    assert results.get("a", "bob") is None
    assert results.get("b", "ann") is None


def test_a_result_expires_after_its_time() -> None:
    results, slab = store(), Slab()
    results.put("ann", result("a", 10, slab.memory), now=0)
    results.put("ann", result("b"), now=5)

    assert results.next_expiry() == 600
    results.expire(now=599)
    assert "a" in results
    results.expire(now=600)

    assert "a" not in results
    assert "b" in results
    assert slab.given_back == 1


def test_delivered_results_go_first_and_the_largest_of_them_first() -> None:
    results = store(room_for=8)
    results.put("ann", result("waiting"), now=0)
    results.put("ann", result("small"), now=1)
    results.put("ann", result("large", 3 * RECORD_BYTES), now=2)
    results.mark_delivered("small")
    results.mark_delivered("large")

    results.put("ann", result("new", 2 * RECORD_BYTES), now=3)

    assert "large" not in results
    assert all(name in results for name in ("waiting", "small", "new"))
    assert results.statistics().evicted == 1


def test_undelivered_results_go_oldest_first_when_there_is_nothing_else() -> None:
    results = store(room_for=2)
    for moment, name in enumerate("abc"):
        results.put("ann", result(name), now=moment)

    assert [name in results for name in "abc"] == [False, True, True]


def test_memory_goes_back_once_nobody_holds_it() -> None:
    results, slab = store(), Slab()
    outgoing = result("a", 10, slab.memory)
    results.put("ann", outgoing, now=0)
    outgoing.hold()  # a reply is being written

    results.forget("a")
    assert slab.given_back == 0
    outgoing.drop()

    assert slab.given_back == 1


def test_memory_shared_by_two_results_goes_back_with_the_second() -> None:
    results, slab = store(), Slab()
    results.put("ann", result("a", 1, slab.memory), now=0)
    results.put("bob", result("b", 1, slab.memory), now=0)

    results.forget("a")
    assert slab.given_back == 0
    results.clear()

    assert slab.given_back == 1
    assert results.statistics().results == results.statistics().nbytes == 0


def test_a_result_put_twice_replaces_the_first() -> None:
    results, slab = store(), Slab()
    results.put("ann", result("a", 10, slab.memory), now=0)
    results.put("ann", result("a"), now=1)

    assert slab.given_back == 1
    assert results.statistics().results == 1


def test_progress_is_no_result() -> None:
    with pytest.raises(TypeError, match="Queued is no result"):
        store().put("ann", Outgoing(event=Queued("a", 0)), now=0)


def test_bookkeeping_does_not_grow_with_results_that_have_gone() -> None:
    results = store()
    for moment in range(1000):
        results.put("ann", result(f"r{moment}"), now=moment)
        results.mark_delivered(f"r{moment}")
        results.expire(now=moment + 599.5)

    assert results.statistics().results == 1
    assert len(results._delivered) < 200
