"""A work thread runs calls in order, one at a time, while the loop stays free."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from ndif_actor.actor.thread import WorkThread


async def test_calls_run_in_one_thread_in_the_order_they_were_made() -> None:
    thread = WorkThread("work")
    seen: list[tuple[int, int]] = []

    def note(number: int) -> None:
        time.sleep(0.002 * (5 - number))
        seen.append((number, threading.get_ident()))

    await asyncio.gather(*(thread.call(note, number) for number in range(5)))

    assert [number for number, _ in seen] == list(range(5))
    assert len({ident for _, ident in seen}) == 1
    assert seen[0][1] != threading.get_ident()
    await thread.close()


async def test_the_loop_goes_on_during_a_call() -> None:
    thread = WorkThread("work")
    release = threading.Event()
    call = asyncio.ensure_future(thread.call(release.wait, 5))
    await asyncio.sleep(0.01)

    assert not call.done()
    release.set()
    assert await call
    await thread.close()


async def test_an_exception_reaches_the_caller_and_the_thread_lives_on() -> None:
    thread = WorkThread("work")

    with pytest.raises(ZeroDivisionError):
        await thread.call(lambda: 1 / 0)

    assert await thread.call(lambda: "alive") == "alive"
    await thread.close()


async def test_a_closed_thread_refuses_calls() -> None:
    thread = WorkThread("work")
    await thread.close()

    with pytest.raises(RuntimeError):
        await thread.call(lambda: None)
