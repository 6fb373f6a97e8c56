"""Who sends when: users who wait for their answers, or arrivals that wait for nobody.

In a closed loop each of N users sends, waits for the result, thinks, and sends again: a slow server
is asked less. In an open loop requests come at times that were fixed before, whatever the server
does, as if from a public; that shows what a queue does when more comes than is served.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec

from bench.load.asking import OK, Log, Planned, Row, ask
from bench.load.scenarios import Request
from ndif_client.session import Session

#: Seconds a user of a closed loop waits after an error, at least.
_AFTER_ERROR_S = 0.5

#: Draws the next request.
Draw = Callable[[random.Random], Request]


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """When a level measures, in seconds.

    Attributes:
        warmup_s: at its start, sent but not counted.
        duration_s: after that, counted.
        drain_s: after that, nothing is sent, and what is under way may end.
        timeout_s: of one request.
    """

    warmup_s: float
    duration_s: float
    drain_s: float
    timeout_s: float

    @property
    def end_s(self) -> float:
        """When the last request is sent, from the level's start."""
        return self.warmup_s + self.duration_s


def arrivals(rate: float, users: int, end_s: float, draw: Draw, seed: str) -> list[Planned]:
    """Return Poisson arrivals with their requests, the same for the same arguments.

    Args:
        rate: arrivals a second, on average.
        users: each arrival is one of them, at random.
        end_s: seconds from the start until the last may come.
        draw: draws a request.
        seed: of all of it.
    """
    rng, planned = random.Random(seed), []
    at_s = rng.expovariate(rate)
    while at_s < end_s:
        planned.append(Planned(at_s, rng.randrange(users), draw(rng)))
        at_s += rng.expovariate(rate)
    return planned


async def play(
    sessions: Sequence[Session], planned: Sequence[Planned], window: Window, log: Log
) -> None:
    """Send requests at their times (an open loop, or a recording), each by its user's client.

    Args:
        sessions: of the users, by number.
        planned: in the order of their times.
        window: when to stop.
        log: filled while it runs.
    """
    tasks: list[asyncio.Task[Row]] = []
    try:
        for one in planned:
            await _sleep_until(one.at_s, log)
            asking = ask(sessions[one.user % len(sessions)], one, log, window.timeout_s)
            tasks.append(asyncio.create_task(asking))
        await _drain(tasks, window, log)
    finally:
        await _end(tasks)


async def closed(
    sessions: Sequence[Session], draw: Draw, think_s: float, window: Window, log: Log, seed: str
) -> None:
    """Let every user send, wait, think, and send again until the window ends.

    What a user sends follows from the seed and the user's number alone.

    Args:
        sessions: one for each user.
        draw: draws a request.
        think_s: mean of the pause after each answer, which is exponential; 0 for none.
        window: when to stop.
        log: filled while it runs.
        seed: of requests and pauses.
    """
    users = [
        _user(number, session, draw, think_s, window, log, seed)
        for number, session in enumerate(sessions)
    ]
    tasks = [asyncio.create_task(user) for user in users]
    try:
        await _drain(tasks, window, log)
    finally:
        await _end(tasks)


async def _user(
    number: int,
    session: Session,
    draw: Draw,
    think_s: float,
    window: Window,
    log: Log,
    seed: str,
) -> None:
    # Apart, so that pauses do not change what is asked.
    requests, pauses = (random.Random(f"{seed} user {number} {what}") for what in ("ask", "think"))
    at_s = _pause(pauses, think_s)
    while at_s < window.end_s:
        await _sleep_until(at_s, log)
        row = await ask(session, Planned(at_s, number, draw(requests)), log, window.timeout_s)
        at_s = row.done_s + _pause(pauses, think_s)
        if row.status != OK:
            at_s = max(at_s, row.done_s + max(row.retry_after_s or 0.0, _AFTER_ERROR_S))


def _pause(rng: random.Random, mean_s: float) -> float:
    return rng.expovariate(1 / mean_s) if mean_s else 0.0


async def _sleep_until(at_s: float, log: Log) -> None:
    # Also with nothing to wait for: the answers of others must be read between two sends.
    await asyncio.sleep(max(0.0, at_s - log.now()))


async def _drain(tasks: Sequence[asyncio.Task[Any]], window: Window, log: Log) -> None:
    """Wait until all have ended, or the drain has; raise what went wrong in the harness itself."""
    left_s = window.end_s + window.drain_s - log.now()
    if not tasks:
        return
    done, _ = await asyncio.wait(
        tasks, timeout=max(0.0, left_s), return_when=asyncio.FIRST_EXCEPTION
    )
    for task in done:
        task.result()


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def beside(work: Coroutine[Any, Any, None], ticking: Coroutine[Any, Any, None]) -> None:
    """Await `work` while `ticking`, which has no end of its own, runs beside it."""
    ticker = asyncio.create_task(ticking)
    try:
        await work
    finally:
        await _end([ticker])
