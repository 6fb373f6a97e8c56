"""A link: one authenticated connection that carries typed messages and their buffers.

    connect/serve -> handshake (nonces, HMAC both ways, host identities) -> Link

A message is one frame: an envelope in msgpack and buffers out of band. Between processes of one
host, large buffers stay in shared memory and only their place is sent. Each side sends something
every second; a link on which nothing arrives for a while is closed, and so is one at EOF.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import msgspec

from ndif_actor.actor.channel import ByteChannel, ChannelClosed
from ndif_actor.actor.slabs import Block, HostIdentity, SlabMap, SlabPool
from ndif_client.wire.frames import (
    Buffer,
    FrameError,
    FrameLimits,
    encode_frame,
    read_frame,
    whole_frame,
)

#: Smaller buffers are cheaper to send than to share.
SHARE_BYTES = 64 << 10

#: Seconds between signs of life.
HEARTBEAT_S = 1.0

#: Seconds of silence after which a link is dead. Loading weights can hold a peer's loop for long.
SILENCE_S = 30.0

#: Seconds that who asks stays awake for the answer: to be woken takes a process tens of
#: microseconds, as long as a small question and its answer take on their way.
_AWAKE_S = 2e-4

#: Messages received and not yet asked for; then the peer has to wait.
_BACKLOG = 64


class LinkClosed(ConnectionError):
    """The link has ended: closed by a side, lost, silent, or not understood."""


class _Tell(msgspec.Struct, frozen=True, tag="tell", omit_defaults=True):
    """A message; `blocks[i]` says where buffer i lies, None for the next buffer of the frame."""

    message: msgspec.Raw
    blocks: list[Block | None] = []
    asks: int | None = None
    answers: int | None = None


class _Alive(msgspec.Struct, frozen=True, tag="alive"):
    pass


class _Release(msgspec.Struct, frozen=True, tag="release"):
    """Blocks per slab that the receiver is done with."""

    blocks: dict[int, int]


class _Unmap(msgspec.Struct, frozen=True, tag="unmap"):
    slabs: list[int]


_Envelope = _Tell | _Alive | _Release | _Unmap
_encoder = msgspec.msgpack.Encoder()
_envelopes = msgspec.msgpack.Decoder(_Envelope)

#: What decoding and mapping raise for bytes that no honest peer sends.
_UNREADABLE = (FrameError, msgspec.DecodeError, OSError, ValueError)

MessageT = TypeVar("MessageT")


class Received(Generic[MessageT]):
    """A message and its buffers, which stay valid until `release`."""

    __slots__ = ("_borrowed", "_link", "_number", "buffers", "message")

    def __init__(
        self,
        message: MessageT,
        buffers: list[memoryview],
        link: Link[Any],
        number: int | None,
        borrowed: dict[int, int],
    ) -> None:
        self.message = message
        self.buffers = buffers
        self._link = link
        self._number = number
        self._borrowed = borrowed

    async def reply(self, message: msgspec.Struct, buffers: Sequence[Buffer] = ()) -> None:
        """Answer an `ask`.

        Raises:
            LookupError: the message was told, not asked.
        """
        if self._number is None:
            raise LookupError(f"{type(self.message).__name__} was told, not asked")
        await self._link._send(message, buffers, answers=self._number)

    def release(self) -> None:
        """Give the buffers back to the sender; they must not be read any more."""
        if self._borrowed:
            borrowed, self._borrowed = self._borrowed, {}
            self._link._give_back(borrowed)


class LinkStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Messages and bytes over this link so far, and messages waiting to be received."""

    sent: int
    received: int
    received_bytes: int
    waiting: int


class Link(Generic[MessageT]):
    """An open link; `MessageT` is the union of messages it accepts."""

    def __init__(
        self,
        channel: ByteChannel,
        peer: HostIdentity,
        accepts: Any,
        limits: FrameLimits,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.peer = peer
        self._channel = channel
        self._decoder: msgspec.msgpack.Decoder[MessageT] = msgspec.msgpack.Decoder(accepts)
        self._limits = limits
        self._silence_s = silence_s
        self._shares = HostIdentity.of_this_process().shares_memory_with(peer)
        self._pool = SlabPool()
        self._map = SlabMap(peer)
        self._blocks: dict[int, tuple[memoryview, Block]] = {}
        self._inbox: asyncio.Queue[Received[MessageT] | LinkClosed] = asyncio.Queue(_BACKLOG)
        self._answers: dict[int, asyncio.Future[Received[MessageT]]] = {}
        self._asks = itertools.count()
        self._sent = self._received = 0
        self._closed: LinkClosed | None = None
        self._unreadable: Exception | None = None
        self._background: set[asyncio.Task[None]] = set()
        for work in (self._read(), self._stay_alive()):
            self._spawn(work)

    # ------------------------------------------------------------ sending

    def allocate(self, nbytes: int) -> memoryview:
        """Return writable memory for a buffer to be sent once: shared with the peer if possible."""
        if not self._shares or nbytes < SHARE_BYTES:
            return memoryview(bytearray(nbytes))
        view, block = self._pool.allocate(nbytes)
        # The entry keeps the view alive, so that its id stays its own until it is sent.
        self._blocks[id(view)] = (view, block)
        return view

    async def send(self, message: msgspec.Struct, buffers: Sequence[Buffer] = ()) -> None:
        """Tell the peer something; wait only while it is slow to take it.

        Raises:
            LinkClosed: the link has ended.
        """
        await self._send(message, buffers)

    async def ask(
        self, message: msgspec.Struct, buffers: Sequence[Buffer] = (), *, timeout_s: float
    ) -> Received[MessageT]:
        """Send a message and wait for the reply to it.

        Raises:
            TimeoutError: no reply within `timeout_s` seconds.
            LinkClosed: the link has ended.
        """
        number = next(self._asks)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Received[MessageT]] = loop.create_future()
        self._answers[number] = answer
        late: asyncio.TimerHandle | None = None
        end_s = loop.time() + timeout_s
        try:
            if not self._post(message, buffers, asks=number):
                async with asyncio.timeout_at(end_s):
                    await self._drain()
            late = loop.call_at(end_s, _give_up, answer)
            awake_until = loop.time() + _AWAKE_S
            while not answer.done() and loop.time() < awake_until:  # noqa: ASYNC110
                await asyncio.sleep(0)
            return await answer
        finally:
            if late is not None:
                late.cancel()
            del self._answers[number]

    async def _send(
        self, message: msgspec.Struct, buffers: Sequence[Buffer] = (), *, answers: int | None = None
    ) -> None:
        if not self._post(message, buffers, answers=answers):
            await self._drain()

    def _post(
        self,
        message: msgspec.Struct,
        buffers: Sequence[Buffer],
        *,
        asks: int | None = None,
        answers: int | None = None,
    ) -> bool:
        """Send a message; return whether it need not be waited for until that is done."""
        blocks: list[Block | None] = []
        inline: list[Buffer] = []
        for buffer in buffers:
            view, block = self._blocks.pop(id(buffer), (None, None))
            blocks.append(block)
            if view is None:
                inline.append(buffer)
        raw = msgspec.Raw(_encoder.encode(message))
        is_over = self._write(_Tell(raw, blocks, asks, answers), inline)
        self._sent += 1
        return is_over

    def _write(self, envelope: Any, buffers: Sequence[Buffer] = ()) -> bool:
        if self._closed is not None:
            raise self._closed
        try:
            return self._channel.post(encode_frame(_encoder.encode(envelope), buffers))
        except ChannelClosed as error:
            self._end(str(error))
            raise self._closed or LinkClosed(str(error)) from None

    async def _drain(self) -> None:
        try:
            await self._channel.drain()
        except ChannelClosed as error:
            self._end(str(error))
            raise self._closed or LinkClosed(str(error)) from None

    # ------------------------------------------------------------ receiving

    async def receive(self) -> Received[MessageT]:
        """Return the next message.

        Raises:
            LinkClosed: the link has ended, and everything before has been received.
        """
        received = await self._inbox.get()
        if isinstance(received, LinkClosed):
            self._inbox.put_nowait(received)
            raise received
        return received

    async def __aiter__(self) -> AsyncIterator[Received[MessageT]]:
        with suppress(LinkClosed):
            while True:
                yield await self.receive()

    def statistics(self) -> LinkStatistics:
        """Return a snapshot of the counts."""
        return LinkStatistics(
            sent=self._sent,
            received=self._received,
            received_bytes=self._channel.received_bytes,
            waiting=self._inbox.qsize(),
        )

    async def _read(self) -> None:
        try:
            while True:
                await self._channel.read_beyond(self._take_whole)
                if self._unreadable is not None:
                    raise self._unreadable
                frame = await read_frame(self._channel, self._limits)
                received = self._take(_envelopes.decode(frame.header), frame.buffers)
                if received is not None:
                    await self._inbox.put(received)
        except ChannelClosed as error:
            self._end(str(error))
        except _UNREADABLE as error:
            self._end(f"the peer sent what can't be understood: {error}")

    def _take_whole(self, data: memoryview) -> int:
        """Take the frames that are whole, while there is room; return how many bytes these have.

        Small messages need no more than this, and no task has to be woken to read them.
        """
        taken = 0
        try:
            while not self._inbox.full():
                found = whole_frame(data[taken:], self._limits)
                if found is None:
                    break
                frame, nbytes = found
                taken += nbytes
                received = self._take(_envelopes.decode(frame.header), frame.buffers)
                if received is not None:
                    self._inbox.put_nowait(received)
        except _UNREADABLE as error:
            self._unreadable = error
            return 0  # something is left, which ends the waiting
        return taken

    def _take(self, envelope: _Envelope, inline: list[memoryview]) -> Received[MessageT] | None:
        """Take a message in; return it if it is for whoever receives next."""
        match envelope:
            case _Tell():
                received = self._unwrap(envelope, inline)
                self._received += 1
                asked = envelope.answers
                if asked is None:
                    return received
                if (waiting := self._answers.get(asked)) and not waiting.done():
                    waiting.set_result(received)
                else:
                    received.release()
            case _Release(blocks=blocks):
                for slab, count in blocks.items():
                    self._pool.release(slab, count)
                if dropped := self._pool.take_dropped():
                    self._write_in_time(_Unmap(dropped))
            case _Unmap(slabs=slabs):
                for slab in slabs:
                    self._map.drop(slab)
        return None

    def _unwrap(self, envelope: _Tell, inline: list[memoryview]) -> Received[MessageT]:
        own = iter(inline)
        places = envelope.blocks
        if sum(place is None for place in places) != len(inline):
            raise ValueError("the number of buffers is not what the envelope says")
        buffers = [self._map.view(place) if place is not None else next(own) for place in places]
        borrowed: dict[int, int] = {}
        for place in places:
            if place is not None:
                borrowed[place.slab] = borrowed.get(place.slab, 0) + 1
        message = self._decoder.decode(envelope.message)
        return Received(message, buffers, self, envelope.asks, borrowed)

    def _give_back(self, borrowed: dict[int, int]) -> None:
        if self._closed is None:
            self._write_in_time(_Release(borrowed))

    def _write_in_time(self, envelope: _Envelope) -> None:
        """Tell the peer what it need not know any more once the link has ended."""
        with suppress(LinkClosed):
            self._write(envelope)

    # ------------------------------------------------------------ life

    async def _stay_alive(self) -> None:
        loop = asyncio.get_running_loop()
        seen, since = -1, loop.time()
        with suppress(LinkClosed):
            while True:
                self._write(_Alive())
                await asyncio.sleep(HEARTBEAT_S)
                if self._channel.received_bytes != seen or self._inbox.full():
                    seen, since = self._channel.received_bytes, loop.time()
                elif loop.time() - since > self._silence_s:
                    self._end(f"no sign of life for {self._silence_s:.0f} s")

    async def close(self) -> None:
        """End the link; what was sent still arrives."""
        self._end("closed by this side")
        self._channel.close()
        await asyncio.gather(*self._background, return_exceptions=True)

    def _end(self, reason: str) -> None:
        if self._closed is not None:
            return
        self._closed = LinkClosed(reason)
        if reason != "closed by this side":
            self._channel.abort(reason)
        self._pool.close()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(self._closed)
        # There must be room for the end itself.
        self._spawn(self._inbox.put(self._closed))
        for task in self._background:
            if task is not _current_task() and task.get_name() == "link":
                task.cancel()

    def _spawn(self, work: Any) -> None:
        name = "end" if self._closed is not None else "link"
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _give_up(answer: asyncio.Future[Any]) -> None:
    if not answer.done():
        answer.set_exception(TimeoutError())


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
