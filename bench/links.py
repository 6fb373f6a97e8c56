"""Two actors of ours, each in a process of its own, and what is sent between them.

The asker lives in the process that holds a `Pair`; the other actor in one that it starts. Both run
the event loop that the server runs.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import secrets
import socket
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import msgspec

#: Distance of the bytes that whoever receives memory reads: one of each page.
PAGE_BYTES = 4096

#: Seconds. Between two calls the asker's loop stands still, and shows no sign of life.
_SILENCE_S = 3600.0


class Take(msgspec.Struct, frozen=True, tag="take"):
    """Read the buffer that comes with this, and say so if that is wanted."""

    answer: bool


class Give(msgspec.Struct, frozen=True, tag="give"):
    """Send that many bytes back."""

    num_bytes: int


class Told(msgspec.Struct, frozen=True, tag="told"):
    """How many messages were told so far, and a sum of what was read."""

    messages: int
    total: int


Spoken = Take | Give | Told


class Pair:
    """An actor in this process that asks, and one in another that answers."""

    def __init__(self) -> None:
        import uvloop

        self._folder = tempfile.TemporaryDirectory(prefix="ndif-links-")
        path = str(Path(self._folder.name) / "link")
        secret = secrets.token_bytes(32)
        context = multiprocessing.get_context("spawn")
        ready, told = context.Pipe(duplex=False)
        self._process = context.Process(target=_answer, args=(path, secret, told), daemon=True)
        self._process.start()
        told.close()  # so that the end of the process ends the waiting too
        ready.recv_bytes()
        self._loop = uvloop.new_event_loop()
        self._link: Any = self._loop.run_until_complete(_connect(path, secret))

    def there(self, num_bytes: int, calls: int) -> float:
        """Ask the actor to read an array of ours; return the mean seconds of one call."""
        return self._timed(self._there(_array(num_bytes), calls)) / calls

    def back(self, num_bytes: int, calls: int) -> float:
        """Ask the actor for an array and read it; return the mean seconds of one call."""
        return self._timed(self._back(num_bytes, calls)) / calls

    def tell(self, num_bytes: int, calls: int) -> float:
        """Send arrays without waiting, until the last was read; return the seconds of each."""
        return self._timed(self._tell(_array(num_bytes), calls)) / calls

    def close(self) -> None:
        """End both."""
        self._loop.run_until_complete(self._link.close())
        self._loop.close()
        self._process.join()
        self._folder.cleanup()

    def _timed(self, work: Any) -> float:
        began = time.perf_counter()
        self._loop.run_until_complete(work)
        return time.perf_counter() - began

    async def _there(self, array: Any, calls: int) -> None:
        for _ in range(calls):
            answer = await self._link.ask(Take(True), [self._shared(array)], timeout_s=60)
            answer.release()

    async def _back(self, num_bytes: int, calls: int) -> None:
        for _ in range(calls):
            answer = await self._link.ask(Give(num_bytes), timeout_s=60)
            read(answer.buffers[0])
            answer.release()

    async def _tell(self, array: Any, calls: int) -> None:
        for _ in range(calls):
            await self._link.send(Take(False), [self._shared(array)])
        answer = await self._link.ask(Told(0, 0), timeout_s=60)
        answer.release()

    def _shared(self, array: Any) -> memoryview:
        return _copy(self._link, array)


class Echo:
    """Bytes sent to another process and back over a unix socket, by uvloop and nothing else."""

    def __init__(self) -> None:
        import uvloop

        own, other = socket.socketpair()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_echo, args=(other,), daemon=True)
        self._process.start()
        other.close()
        self._loop = uvloop.new_event_loop()
        made = self._loop.create_unix_connection(_Answers, sock=own)
        transport, self._answers = self._loop.run_until_complete(made)
        self._transport = cast(asyncio.Transport, transport)

    def there(self, num_bytes: int, calls: int) -> float:
        """Send so many bytes and wait for them to come back; return the mean seconds of it."""
        began = time.perf_counter()
        self._loop.run_until_complete(self._ask(bytes(num_bytes), calls))
        return (time.perf_counter() - began) / calls

    def close(self) -> None:
        """End both."""
        self._transport.close()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()
        self._process.join()

    async def _ask(self, data: bytes, calls: int) -> None:
        for _ in range(calls):
            self._answers.missing = len(data)
            self._answers.whole = self._loop.create_future()
            self._transport.write(data)
            await self._answers.whole


class _Answers(asyncio.Protocol):
    """Waits for so many bytes."""

    missing = 0
    whole: asyncio.Future[None]

    def data_received(self, data: bytes) -> None:
        self.missing -= len(data)
        if not self.missing:
            self.whole.set_result(None)


class _Echoes(asyncio.Protocol):
    """Sends back what comes."""

    def __init__(self, ended: asyncio.Event) -> None:
        self._ended = ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended.set()


def _echo(other: socket.socket) -> None:
    import uvloop

    async def serve() -> None:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: _Echoes(ended), sock=other)
        await ended.wait()

    uvloop.run(serve())


def read(memory: Any) -> int:
    """Read one byte of each page of an array or buffer; return their sum."""
    import numpy

    return int(numpy.frombuffer(memory, numpy.uint8)[::PAGE_BYTES].sum())


def _array(num_bytes: int) -> Any:
    import numpy

    return numpy.ones(num_bytes, numpy.uint8)


def _copy(link: Any, array: Any) -> memoryview:
    import numpy

    from ndif_actor.actor.link import SHARE_BYTES

    if array.nbytes < SHARE_BYTES:
        return memoryview(array)  # sending it is cheaper than sharing it
    memory: memoryview = link.allocate(array.nbytes)
    numpy.frombuffer(memory, numpy.uint8)[:] = array
    return memory


async def _connect(path: str, secret: bytes) -> Any:
    from ndif_actor.actor.handshake import Address, connect

    return await connect(Address(path=path), secret, Spoken, silence_s=_SILENCE_S)


def _answer(path: str, secret: bytes, told: Connection) -> None:
    """Run the other actor until the link ends."""
    import uvloop

    uvloop.run(_serve(path, secret, told))


async def _serve(path: str, secret: bytes, told: Connection) -> None:
    from ndif_actor.actor.handshake import Address, serve

    ended = asyncio.Event()
    arrays: dict[int, Any] = {}

    async def answer(link: Any) -> None:
        messages = total = 0
        async for received in link:
            message = received.message
            match message:
                case Take(answer=wanted):
                    messages, total = messages + 1, total + read(received.buffers[0])
                    if wanted:
                        await received.reply(Told(messages, total))
                case Give(num_bytes=size):
                    if size not in arrays:
                        arrays[size] = _array(size)
                    await received.reply(message, [_copy(link, arrays[size])])
                case Told():
                    await received.reply(Told(messages, total))
            received.release()
        await link.close()
        ended.set()

    server, _ = await serve(Address(path=path), secret, Spoken, answer, silence_s=_SILENCE_S)
    told.send_bytes(b"ready")
    await ended.wait()
    server.close()
