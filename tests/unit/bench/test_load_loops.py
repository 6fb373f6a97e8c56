"""Closed loops wait for answers, open ones for nobody, and every request leaves its row."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from bench.load import asking
from bench.load.asking import Log, Planned
from bench.load.loops import Window, closed, play
from bench.load.scenarios import Request
from bench.load.summary import summarise
from ndif_client.errors import BusyError, ExecutionError
from ndif_client.progress import Progress
from ndif_client.results import Result
from ndif_client.wire.messages import Done, Fault, Statistics

#: What a server does with a request, given the times it was asked.
Serve = Callable[[int], Any]


def window(duration_s: float = 0.5, drain_s: float = 2.0, timeout_s: float = 5.0) -> Window:
    return Window(warmup_s=0.0, duration_s=duration_s, drain_s=drain_s, timeout_s=timeout_s)


def answer() -> Result:
    seen = Statistics(queue_s=0.01, forward_s=0.02, forward=3, groups=2, tokens=9)
    done = Done(id="request1", prompts=[], tensors=[], statistics=seen)
    return Result(done, [memoryview(b"12345678")], {}, "numpy")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Serve], None]:
    """Put a function in the place of client and server."""

    def install(serving: Serve) -> None:
        asked = 0

        async def run(note: Callable[[Progress], object]) -> Result:
            nonlocal asked
            asked += 1
            note(Progress("request1", "running", groups=2))
            await serving(asked)
            return answer()

        monkeypatch.setattr(asking.scenarios, "write", lambda session, request, note: run(note))

    return install


def draw(rng: Random) -> Request:
    return Request(scenario="hidden-states", tokens=[rng.randrange(300)])


def sessions(count: int) -> Any:
    return [None] * count


async def test_an_open_loop_sees_all_of_a_stall_that_a_closed_loop_hides(
    serve: Callable[[Serve], None],
) -> None:
    async def stall_once(asked: int) -> None:
        server = gate
        async with server:
            await asyncio.sleep(0.3 if asked == 5 else 0.001)

    serve(stall_once)
    gate = asyncio.Lock()
    planned = [Planned(0.01 * n, 0, draw(Random(n))) for n in range(40)]
    opened = Log()
    await play(sessions(1), planned, window(), opened)
    gate = asyncio.Lock()
    serve(stall_once)
    waited = Log()
    await closed(sessions(1), draw, 0.0, window(), waited, "seed")

    # The arrivals of those 0.3 s have waited; the one user asked nothing meanwhile.
    assert sum(row.latency_s > 0.05 for row in opened.rows) > 15
    assert sum(row.latency_s > 0.05 for row in waited.rows) < 5  # one, and what this machine adds


async def test_a_user_asks_the_same_whatever_the_server_does(
    serve: Callable[[Serve], None],
) -> None:
    asked: list[dict[int, list[int]]] = []
    for seconds in (0.002, 0.02):
        serve(lambda _, seconds=seconds: asyncio.sleep(seconds))
        log = Log()
        await closed(sessions(3), draw, 0.01, window(0.5), log, "seed")
        tokens: dict[int, list[int]] = defaultdict(list)
        for one in log.sent:
            tokens[one.user] += one.request.tokens
        asked.append(tokens)

    for user in range(3):
        both = [tokens[user] for tokens in asked]
        common = min(map(len, both))
        assert common > 2
        assert both[0][:common] == both[1][:common]
    assert asked[0][0][:3] != asked[0][1][:3]


async def test_every_request_leaves_a_row_whatever_becomes_of_it(
    serve: Callable[[Serve], None],
) -> None:
    async def misbehave(asked: int) -> None:
        if asked == 1:
            raise BusyError("full", Fault(kind="busy", message="full", retry_after=0.1))
        if asked == 2:
            fault = Fault(kind="execution", message="bad\nat your line")
            raise ExecutionError("bad\nat your line", fault)
        if asked == 3:
            await asyncio.sleep(60)  # longer than the timeout
        if asked == 4:
            raise ConnectionResetError("reset")

    serve(misbehave)
    log = Log()
    planned = [Planned(0.01 * n, n, draw(Random(n))) for n in range(5)]
    await play(sessions(5), planned, window(timeout_s=0.2), log)

    by_user = {row.user: row for row in log.rows}
    assert [by_user[user].status for user in range(5)] == [
        "refused",
        "execution",
        "timeout",
        "connect",
        "ok",
    ]
    assert by_user[0].retry_after_s == 0.1
    assert by_user[1].error == "bad"
    assert (by_user[4].bytes, by_user[4].groups, by_user[4].rows) == (8, 2, 9)
    assert by_user[4].transfer_s is not None
    assert log.in_flight == 0


async def test_what_has_not_ended_after_the_drain_is_cancelled_and_counted(
    serve: Callable[[Serve], None],
) -> None:
    serve(lambda _: asyncio.sleep(60))
    log, short = Log(), window(0.1, drain_s=0.1)
    await play(sessions(1), [Planned(0.0, 0, draw(Random(0)))], short, log)
    await closed(sessions(1), draw, 0.0, short, log := Log(), "seed")

    assert [row.status for row in log.rows] == ["unfinished"]
    found = summarise(log.rows, short, objective_s=1.0)
    assert found.latency is not None and found.latency.known_to is not None
    assert found.errors == {"unfinished": 1}


async def test_a_refused_user_of_a_closed_loop_comes_back_later(
    serve: Callable[[Serve], None],
) -> None:
    async def refuse(_: int) -> None:
        raise BusyError("full", Fault(kind="busy", message="full", retry_after=0.2))

    serve(refuse)
    log = Log()
    await closed(sessions(1), draw, 0.0, window(0.9), log, "seed")

    assert 1 <= len(log.rows) <= 2  # at once, and half a second later; not thousands of times


async def test_a_mistake_of_the_harness_ends_the_test(serve: Callable[[Serve], None]) -> None:
    async def fail(_: int) -> None:
        raise KeyError("a bug")

    serve(fail)
    with pytest.raises(KeyError):
        await closed(sessions(1), draw, 0.0, window(), Log(), "seed")
