"""Event streams: what a reader gets, and what happens without one."""

from __future__ import annotations

import asyncio

from ndif_actor.coordinator.results import Memory, Outgoing
from ndif_actor.coordinator.stream import EventStream
from ndif_client.wire.messages import Event, Failed, Fault, Queued, Running


def failed(name: str) -> Failed:
    return Failed(name, Fault(kind="internal", message="stands for any end"))


def push(stream: EventStream, *events: Event) -> None:
    for event in events:
        stream.push(Outgoing(event=event))


async def collect(stream: EventStream) -> list[list[Event]]:
    return [[outgoing.event for outgoing in batch] async for batch in stream.batches()]


async def test_a_stream_ends_when_all_its_requests_have_ended() -> None:
    stream = EventStream(["a", "b"])
    reader = asyncio.create_task(collect(stream))
    push(stream, Queued("a", 0), Running("a", 1), failed("a"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not reader.done()

    push(stream, failed("b"))

    assert await reader == [[Queued("a", 0), Running("a", 1), failed("a")], [failed("b")]]


async def test_a_newer_position_replaces_one_that_was_not_read() -> None:
    stream = EventStream(["a", "b"])
    push(stream, Queued("a", 5), Queued("b", 6), Queued("a", 2), failed("a"), failed("b"))

    assert await collect(stream) == [[Queued("a", 2), Queued("b", 6), failed("a"), failed("b")]]


async def test_a_closed_stream_holds_no_memory() -> None:
    given_back = []
    memory = Memory(1, lambda: given_back.append(True))
    stream = EventStream(["a", "b"])
    stream.push(Outgoing(event=failed("a"), memories=(memory,)))

    stream.close()
    assert given_back == [True]
    stream.push(Outgoing(event=failed("b"), memories=(memory,)))

    assert given_back == [True]
