"""Event frames on a real socket: whole, in order, and off the wire when a write returns."""

from __future__ import annotations

import asyncio
import itertools

import msgspec
import pytest
import uvloop
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from ndif_actor.coordinator.results import Outgoing
from ndif_actor.http.frames import JOIN_BYTES, WRITE_BYTES, FrameWriter, start_frames
from ndif_client.wire.frames import FrameLimits, split_frame
from ndif_client.wire.messages import Event, Queued, Running


async def roundtrip(*batches: list[Outgoing]) -> bytes:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = await start_frames(request)
        writer = FrameWriter(response)
        for batch in batches:
            await writer.write(batch)
        await response.write_eof()
        return response

    application = web.Application()
    application.router.add_get("/", handler)
    async with TestClient(TestServer(application)) as client, client.get("/") as reply:
        return await reply.read()


SIZES = [0, 1, JOIN_BYTES, JOIN_BYTES + 1, WRITE_BYTES, WRITE_BYTES + 7, 3 * WRITE_BYTES - 1]


@pytest.mark.parametrize("sizes", [[size] for size in SIZES] + [SIZES])
async def test_buffers_of_every_size_arrive_as_they_are(sizes: list[int]) -> None:
    pattern = bytes(itertools.islice(itertools.cycle(range(251)), max(sizes)))
    buffers = [memoryview(pattern)[:size] for size in sizes]

    data = await roundtrip([Outgoing(event=Running("abcdefgh", 3), buffers=buffers)])

    frame = split_frame(data, FrameLimits())
    assert msgspec.msgpack.decode(frame.header, type=Event) == Running("abcdefgh", 3)
    assert [bytes(buffer) for buffer in frame.buffers] == [bytes(buffer) for buffer in buffers]


async def test_frames_follow_each_other_in_order() -> None:
    first = [Outgoing(event=Queued("abcdefgh", 1)), Outgoing(event=Running("abcdefgh", 2))]
    data = await roundtrip(first, [Outgoing(event=Queued("ijklmnop", 3))])

    assert data.count(b"NDIF") == 3
    assert data.index(b"queued") < data.index(b"running") < data.rindex(b"queued")


def test_memory_may_be_reused_as_soon_as_a_write_returns() -> None:
    """On uvloop, as the server runs: it keeps the memory itself while a slow reader lags."""
    assert uvloop.run(_reuse_memory(rounds=30)) == {0xF1}


async def _reuse_memory(rounds: int) -> set[int]:
    memory = bytearray(WRITE_BYTES + JOIN_BYTES)

    async def handler(request: web.Request) -> web.StreamResponse:
        response = await start_frames(request)
        writer = FrameWriter(response)
        for _ in range(rounds):
            memory[:] = b"\xf1" * len(memory)
            event = Outgoing(event=Running("abcdefgh", 1), buffers=[memoryview(memory)])
            await writer.write([event])
            memory[:] = b"\xf2" * len(memory)
        await response.write_eof()
        return response

    seen: set[int] = set()
    application = web.Application()
    application.router.add_get("/", handler)
    async with TestServer(application) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        while chunk := await reader.read(20_000):
            await asyncio.sleep(0)
            seen |= set(chunk) & {0xF1, 0xF2}
        writer.close()
    return seen
