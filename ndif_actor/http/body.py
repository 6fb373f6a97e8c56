"""Request bodies: bounded before they are read, and within a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import TypeVar

import msgspec
from aiohttp import web

from ndif_actor.http.faults import HttpFault
from ndif_client.wire.frames import Frame, FrameError, FrameLimits, read_frame

#: Seconds a client has to send its whole body.
BODY_TIMEOUT_S = 120.0

#: Bytes of a JSON body.
MAX_JSON_BYTES = 8 << 20

T = TypeVar("T")


class Uploads:
    """Bounds what all bodies being received may take together."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._nbytes = 0

    @contextlib.contextmanager
    def room_for(self, request: web.Request) -> Iterator[None]:
        """Reserve the announced length of a body while it is received and decoded.

        Raises:
            HttpFault: no length is announced, or others take the room just now.
        """
        length = request.content_length
        if length is None:
            raise HttpFault("protocol", "a Content-Length is needed", status=411)
        if self._nbytes and self._nbytes + length > self._max_bytes:
            message = f"{self._nbytes} of {self._max_bytes} bytes are being received already"
            raise HttpFault("busy", message, retry_after_s=1.0)
        self._nbytes += length
        try:
            yield
        finally:
            self._nbytes -= length


class BodySource:
    """The body of a request as `read_frame` wants it."""

    def __init__(self, request: web.Request) -> None:
        self._content = request.content
        self._left = memoryview(b"")

    async def read_into(self, target: memoryview) -> None:
        """Fill `target` completely.

        Raises:
            EOFError: the body ended before.
        """
        filled = 0
        while filled < target.nbytes:
            if not self._left:
                self._left = memoryview(await self._content.readany())
                if not self._left:
                    raise EOFError("the body is cut short")
            part = self._left[: target.nbytes - filled]
            target[filled : filled + part.nbytes] = part
            self._left = self._left[part.nbytes :]
            filled += part.nbytes

    async def at_end(self) -> bool:
        """Whether nothing follows."""
        if not self._left:
            self._left = memoryview(await self._content.readany())
        return not self._left


async def receive_frame(request: web.Request, max_bytes: int) -> Frame:
    """Read the frame that is the whole body of a request.

    Raises:
        HttpFault: it is larger than it may be, too slow, or no frame.
    """
    check_length(request, max_bytes)
    limits = FrameLimits(
        max_header_bytes=min(FrameLimits().max_header_bytes, max_bytes),
        max_buffer_bytes=max_bytes,
        max_total_bytes=max_bytes,
    )
    source = BodySource(request)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            frame = await read_frame(source, limits)
            if not await source.at_end():
                raise HttpFault("protocol", "the body goes on after its frame has ended")
            return frame
    except FrameError as error:
        raise HttpFault("protocol", str(error)) from None
    except EOFError:
        raise HttpFault("protocol", "the body ends in the middle of its frame") from None
    except TimeoutError:
        raise HttpFault(
            "protocol", f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s", status=408
        ) from None


async def receive_json(request: web.Request, kind: type[T]) -> T:
    """Read and check a JSON body.

    Raises:
        HttpFault: it is too large, too slow, or not a `kind`.
    """
    check_length(request, MAX_JSON_BYTES)
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.content.iter_any():
                data += chunk
                if len(data) > MAX_JSON_BYTES:
                    raise _too_large(len(data), MAX_JSON_BYTES)
    except TimeoutError:
        raise HttpFault(
            "protocol", f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s", status=408
        ) from None
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise HttpFault("protocol", f"the body is no {kind.__name__}: {error}") from None


def check_length(request: web.Request, max_bytes: int) -> None:
    """Refuse a body that announces more than `max_bytes`.

    Raises:
        HttpFault: it does.
    """
    length = request.content_length
    if length is not None and length > max_bytes:
        raise _too_large(length, max_bytes)


def _too_large(nbytes: int, max_bytes: int) -> HttpFault:
    return HttpFault("limit", f"a body of {nbytes} bytes; the limit is {max_bytes}")
