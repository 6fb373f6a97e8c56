"""Event frames on their way out: small pieces joined, large ones as slices of their own memory.

A slice's memory may be reused as soon as its event has been written, so a write has to be over
when it returns: the transport's high-water mark is zero, and what is too small for aiohttp to
wait for is copied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from aiohttp import web

from ndif_actor.coordinator.results import Outgoing
from ndif_client.wire.frames import Buffer, encode_frame

#: The content type of one frame, and of a stream of them.
CONTENT_TYPE = "application/vnd.ndif.frames"

#: Bytes of one write; larger ones gain nothing, smaller ones cost (chunk heads, wake-ups).
WRITE_BYTES = 1 << 20

#: Pieces up to this many bytes are copied together; aiohttp waits for every longer write.
JOIN_BYTES = 64 << 10

#: Seconds a client may take to accept `WRITE_BYTES`; then it no longer holds the result.
WRITE_TIMEOUT_S = 60.0

_encoder = msgspec.msgpack.Encoder()


class FrameWriter:
    """Writes event frames to one prepared response."""

    def __init__(self, response: web.StreamResponse) -> None:
        self._response = response
        self._small = bytearray()

    async def write(self, batch: Sequence[Outgoing]) -> None:
        """Write all events of `batch`; when this returns, none of their memory is in use.

        Raises:
            ConnectionError: the client is gone.
            TimeoutError: the client has stopped reading.
        """
        for outgoing in batch:
            for piece in encode_frame(_encoder.encode(outgoing.event), outgoing.buffers):
                await self._add(piece)
        await self._flush()

    async def _add(self, piece: Buffer) -> None:
        view = memoryview(piece)
        if view.nbytes <= JOIN_BYTES:
            self._small += view
            if len(self._small) > JOIN_BYTES:
                await self._flush()
            return
        await self._flush()
        start = 0
        while view.nbytes - start > JOIN_BYTES:
            await self._send(view[start : start + WRITE_BYTES])
            start += WRITE_BYTES
        self._small += view[start:]

    async def _flush(self) -> None:
        if self._small:
            small, self._small = self._small, bytearray()
            await self._send(small)

    async def _send(self, data: Buffer) -> None:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await self._response.write(data)


async def start_frames(request: web.Request, status: int = 200) -> web.StreamResponse:
    """Send the head of a reply that consists of frames."""
    response = web.StreamResponse(status=status, headers={"Content-Type": CONTENT_TYPE})
    assert request.transport is not None
    request.transport.set_write_buffer_limits(high=0)
    await response.prepare(request)
    return response
