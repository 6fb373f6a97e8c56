"""A byte stream that fills the caller's memory directly and writes without joining."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import cast

from ndif_client.wire.frames import Buffer

#: Bytes read ahead; targets at least this large are filled by the socket itself.
_AHEAD_BYTES = 64 << 10

#: What is shorter is copied rather than waited for, while no more than that is unsent.
_COPY_BYTES = 64 << 10


class ChannelClosed(EOFError):
    """The stream has ended."""


class ByteChannel(asyncio.BufferedProtocol):
    """Both directions of one connection; one reader at a time."""

    def __init__(self) -> None:
        self.received_bytes = 0
        self._transport: asyncio.Transport | None = None
        self._ahead = memoryview(bytearray(_AHEAD_BYTES))
        self._start = self._stop = 0
        self._target: memoryview | None = None
        self._take: Callable[[memoryview], int] | None = None
        self._wanted: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._paused = False
        self._end: Exception | None = None

    # ------------------------------------------------------------ asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        # A write is over only when the socket has everything: its memory may then be reused.
        self._transport.set_write_buffer_limits(high=0)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._target is not None:
            return self._target
        if self._start == self._stop:
            self._start = self._stop = 0
        return self._ahead[self._stop :]

    def buffer_updated(self, nbytes: int) -> None:
        self.received_bytes += nbytes
        if self._target is not None:
            self._target = self._target[nbytes:]
            if not self._target.nbytes:
                self._target = None
                self._wake()
            return
        self._stop += nbytes
        if self._take is not None:
            self._start += self._take(self._ahead[self._start : self._stop])
            if self._start == self._stop:
                self._start = self._stop = 0
                return
            self._take = None
        if self._stop == self._ahead.nbytes and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        self._finish(ChannelClosed("the other side has closed the connection"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        reason = f": {exc}" if exc else ""
        self._finish(ChannelClosed(f"the connection is lost{reason}"))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # ------------------------------------------------------------ our side

    async def read_beyond(self, take: Callable[[memoryview], int]) -> None:
        """Let `take` have what arrives, at once, until it leaves something to be read.

        It is given what is there, and returns how many bytes of that it has taken.

        Raises:
            ChannelClosed: the stream ended before.
        """
        self._start += take(self._ahead[self._start : self._stop])
        if self._start < self._stop:
            return
        if self._end is not None:
            raise self._end
        self._wanted = asyncio.get_running_loop().create_future()
        self._take = take
        self._resume()
        try:
            await self._wanted
        finally:
            self._wanted = self._take = None
        if self._start == self._stop and self._end is not None:
            raise self._end

    async def read_into(self, target: memoryview) -> None:
        """Fill `target` completely.

        Raises:
            ChannelClosed: the stream ended before.
        """
        while target.nbytes:
            held = min(self._stop - self._start, target.nbytes)
            target[:held] = self._ahead[self._start : self._start + held]
            self._start += held
            target = target[held:]
            if not target.nbytes:
                return
            if self._end is not None:
                raise self._end
            self._wanted = asyncio.get_running_loop().create_future()
            direct = target.nbytes >= _AHEAD_BYTES
            if direct:
                self._target = target
            self._resume()
            try:
                await self._wanted
            finally:
                self._wanted = None
                self._target = None
            if direct:
                if self._end is not None:
                    raise self._end
                return

    def post(self, pieces: Sequence[Buffer]) -> bool:
        """Send all pieces, in order; return whether `drain` is not to be waited for.

        Where it is, they may be reused only after it.

        Raises:
            ChannelClosed: the stream has ended.
        """
        if self._end is not None or self._transport is None:
            raise self._end or ChannelClosed("the connection is not open")
        if sum(map(len, pieces)) > _COPY_BYTES:
            self._transport.writelines(pieces)
            return False
        self._transport.write(b"".join(pieces))
        return self._transport.get_write_buffer_size() <= _COPY_BYTES

    async def drain(self) -> None:
        """Wait until everything that was sent is on its way.

        Raises:
            ChannelClosed: the stream has ended.
        """
        await self._writable.wait()
        if self._end is not None:
            raise self._end

    async def write(self, pieces: Sequence[Buffer]) -> None:
        """Send all pieces, in order; return when they may be reused or are copied.

        Raises:
            ChannelClosed: the stream has ended.
        """
        if not self.post(pieces):
            await self.drain()

    def close(self) -> None:
        """Close the connection; what was written is still sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self, reason: str) -> None:
        """Drop the connection at once."""
        self._finish(ChannelClosed(reason))
        if self._transport is not None:
            self._transport.abort()

    def _resume(self) -> None:
        if self._paused and self._transport is not None:
            self._paused = False
            self._start = self._stop = 0
            self._transport.resume_reading()

    def _wake(self) -> None:
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    def _finish(self, end: Exception) -> None:
        if self._end is None:
            self._end = end
        self._writable.set()
        self._wake()
