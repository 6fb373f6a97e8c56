"""Requests on their way: sent together where they can be, followed until each has ended.

Requests submitted in the same turn of the event loop, as `asyncio.gather` does, go out in one
POST, so that the server admits them together and they can share a forward. One that comes after a
request of another POST is sent when that has arrived. Where they are more than the server takes at
once, the rest is sent when some have ended. When the stream of their events breaks, each
is asked for by its id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import msgspec

from ndif_client.batching import Encoded, frames_of
from ndif_client.errors import (
    BusyError,
    ConnectError,
    NdifError,
    ProtocolError,
    TraceCancelledError,
    UnavailableError,
    from_fault,
)
from ndif_client.explanation import Explanation, Explanations
from ndif_client.transport import BrokenStreamError, Transport, quoted
from ndif_client.wire.frames import Buffer, Frame
from ndif_client.wire.messages import (
    Done,
    Event,
    Failed,
    Generated,
    Logged,
    Queued,
    Running,
    TraceRequest,
)

#: Seconds between two questions about a trace whose stream broke: the first, and the longest.
_ASK_AGAIN_S = (0.1, 2.0)

#: Seconds to go on asking a server that does not answer.
_GIVE_UP_S = 30.0

#: Seconds a cancel may take while the session closes.
_CANCEL_S = 2.0

_events: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)

#: A result and the buffers it refers to.
Reply = tuple[Done, list[memoryview]]


class Pending:
    """One request until it has ended."""

    def __init__(
        self,
        request: TraceRequest,
        buffers: Sequence[bytes],
        on_event: Callable[[Queued | Running], None],
        on_token: Callable[[Generated], None] | None = None,
        on_line: Callable[[Logged], None] | None = None,
    ) -> None:
        self.id = request.id
        self.after = request.after
        self.encoded = Encoded(request, buffers)
        #: set when the server knows of it, or will never do so
        self.arrived = asyncio.Event()
        self.reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        #: what it had saved before it failed
        self.partial: Reply | None = None
        self.was_sent = False
        self.was_heard_of = False
        self.was_resent = False
        self._on_event = on_event
        self._on_token = on_token
        self._on_line = on_line

    def take(self, event: Event, buffers: list[memoryview]) -> None:
        """Note what the server says of this request."""
        self.was_heard_of = True
        self.arrived.set()
        if self.reply.done():
            return
        if isinstance(event, Done):
            self.reply.set_result((event, buffers))
        elif isinstance(event, Failed):
            if event.partial is not None:
                self.partial = event.partial, buffers
            self.reply.set_exception(from_fault(event.fault))
        else:
            try:
                if isinstance(event, Logged):
                    if self._on_line is not None:
                        self._on_line(event)
                elif not isinstance(event, Generated):
                    self._on_event(event)
                elif self._on_token is not None:
                    self._on_token(event)
            except Exception as error:  # the user's own callback; it is raised where he awaits
                self.reply.set_exception(error)

    def fail(self, error: BaseException) -> None:
        """End the request without an answer of its own."""
        self.arrived.set()
        if not self.reply.done():
            self.reply.set_exception(error)


class Submitter:
    """Sends requests and hands each its events."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._waiting: list[Pending] = []
        self._carried: dict[asyncio.Task[None], list[Pending]] = {}
        self._cancels: set[asyncio.Task[None]] = set()

    def submit(
        self,
        request: TraceRequest,
        buffers: Sequence[bytes],
        on_event: Callable[[Queued | Running], None],
        on_token: Callable[[Generated], None] | None = None,
        on_line: Callable[[Logged], None] | None = None,
    ) -> Pending:
        """Send a request at the end of this turn of the event loop.

        Args:
            request, buffers: what to send.
            on_event: told of its progress.
            on_token: told of each step of a generation.
            on_line: told of each line it logs.
        """
        pending = Pending(request, buffers, on_event, on_token, on_line)
        self._enqueue(pending)
        return pending

    def cancel(self, pending: Pending, error: TraceCancelledError) -> asyncio.Task[None] | None:
        """End a request with `error`, and tell the server to forget it, if it has heard of it.

        Returns:
            the telling, if there is anything to tell.
        """
        if pending.reply.done():
            return None
        pending.fail(error)
        pending.reply.exception()  # there may be nobody left who would ask for it
        telling = self._forget(pending)
        for task, batch in self._carried.items():
            if all(other.reply.done() for other in batch):
                task.cancel()
        return telling

    async def close(self) -> None:
        """Cancel everything that has not ended."""
        for pending in [*self._waiting, *(p for b in self._carried.values() for p in b)]:
            if not pending.reply.done():
                self._forget(pending)
                pending.fail(TraceCancelledError("the session was closed before the trace ended"))
        carrying = list(self._carried)
        for task in carrying:
            task.cancel()
        if self._cancels:
            await asyncio.wait(self._cancels, timeout=_CANCEL_S)
        await asyncio.gather(*carrying, return_exceptions=True)

    async def explain(self, request: TraceRequest, buffers: Sequence[bytes]) -> Explanation:
        """Return what a request would cost; nothing runs.

        Raises:
            NdifError: the server refuses it, or can't be reached.
        """
        ((_, frame),) = frames_of([Encoded(request, buffers)])
        reply = await self._transport.post_frame("/v1/explain", frame, Explanations)
        if len(reply.requests) != 1:
            raise ProtocolError(
                f"the server explained {len(reply.requests)} requests in place of 1"
            )
        return reply.requests[0]

    # ------------------------------------------------------------ sending

    def _enqueue(self, pending: Pending) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting.append(pending)

    def _flush(self) -> None:
        waiting, self._waiting = _open(self._waiting), []
        start = 0
        for count, frame in frames_of([p.encoded for p in waiting]):
            batch = waiting[start : start + count]
            start += count
            before = self._others_before(batch)
            for pending in batch:
                pending.was_sent = True
            carrying = self._carry(batch, frame, before)
            task = _task(carrying, lambda task: self._carried.pop(task, None))
            self._carried[task] = batch

    def _others_before(self, batch: list[Pending]) -> list[Pending]:
        """Return the requests of other batches that some of this one come after."""
        wanted = {name for pending in batch for name in pending.after}
        if not wanted:
            return []
        return [p for other in self._carried.values() for p in other if p.id in wanted]

    async def _carry(
        self, batch: list[Pending], frame: Sequence[Buffer], before: list[Pending]
    ) -> None:
        """Send a batch and follow it to its end; whatever goes wrong ends its requests."""
        try:
            for other in before:
                await other.arrived.wait()
            while not await self._is_taken(batch, frame):
                pass
        except Exception as error:
            for pending in batch:
                pending.fail(error)

    async def _is_taken(self, batch: list[Pending], frame: Sequence[Buffer]) -> bool:
        """Send a batch and follow it to its end; False if it is to be sent again.

        A queue that is full of this session's own requests, as of a long chain, has room when some
        of them have ended.

        Raises:
            BusyError: the queue is full, and nothing of ours is in it.
        """
        try:
            if not await self._send(batch, frame):
                await asyncio.gather(*map(self._ask, _open(batch)))
            return True
        except BusyError:
            ours = [task for task, other in self._carried.items() if _is_here(other)]
            if not ours:
                raise
            await asyncio.wait(ours, return_when=asyncio.FIRST_COMPLETED)
            return False

    async def _send(self, batch: list[Pending], frame: Sequence[Buffer]) -> bool:
        """Post the frame and hand out its events; False if they must be asked for instead."""
        by_id = {pending.id: pending for pending in batch}
        try:
            async with self._transport.frames("POST", "/v1/traces", frame) as stream:
                for pending in batch:
                    pending.arrived.set()
                while _open(batch):
                    _hand_out(await stream.read(), by_id)
                await stream.finish()
        except BrokenStreamError:
            return False
        except NdifError as error:
            if error.status != HTTPStatus.CONFLICT:
                raise
            return False  # an earlier POST has arrived although its connection broke
        return True

    # ------------------------------------------------------------ asking by id

    async def _ask(self, pending: Pending) -> None:
        """Ask for a request by its id until it has ended."""
        loop = asyncio.get_running_loop()
        wait_s, most_s = _ASK_AGAIN_S
        heard_s = loop.time()
        while not pending.reply.done():
            try:
                await self._ask_once(pending)
                heard_s = loop.time()
            except (BrokenStreamError, ConnectError) as error:
                for_good = isinstance(error, ConnectError) and error.for_good
                if for_good or loop.time() - heard_s > _GIVE_UP_S:
                    pending.fail(await self._transport.unreachable(error))
            except NdifError as error:
                if error.status == HTTPStatus.NOT_FOUND:
                    self._resend(pending)
                    return
                pending.fail(error)
            if not pending.reply.done():
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, most_s)

    async def _ask_once(self, pending: Pending) -> None:
        path = f"/v1/traces/{quoted(pending.id)}"
        async with self._transport.frames("GET", path) as stream:
            _hand_out(await stream.read(), {pending.id: pending})
            await stream.finish()

    def _resend(self, pending: Pending) -> None:
        """Send a request again that never arrived; its id keeps it from running twice."""
        if pending.was_heard_of or pending.was_resent:
            pending.fail(
                UnavailableError(
                    "the connection broke, and the server no longer knows this trace; send it again"
                )
            )
            return
        pending.was_resent = True
        self._enqueue(pending)

    def _forget(self, pending: Pending) -> asyncio.Task[None] | None:
        if not pending.was_sent:
            return None
        telling = _task(self._delete(pending.id), self._cancels.discard)
        self._cancels.add(telling)
        return telling

    async def _delete(self, name: str) -> None:
        # A trace that has ended by itself, or a server that is gone, needs no cancelling.
        with suppress(NdifError):
            await self._transport.delete(f"/v1/traces/{quoted(name)}")


def _is_here(batch: Iterable[Pending]) -> bool:
    """Whether the server has taken in a batch and not ended all of it."""
    return any(pending.arrived.is_set() and not pending.reply.done() for pending in batch)


def _open(batch: Iterable[Pending]) -> list[Pending]:
    return [pending for pending in batch if not pending.reply.done()]


def _hand_out(frame: Frame, by_id: dict[str, Pending]) -> None:
    """Give the event of a frame to the request it is about."""
    try:
        event = _events.decode(frame.header)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise ProtocolError(f"the server sent an event that is none: {error}") from error
    if event.id not in by_id:
        raise ProtocolError(f"the server sent an event of trace {event.id}, which is not ours")
    by_id[event.id].take(event, frame.buffers)


def _task(
    work: Coroutine[Any, Any, None], when_done: Callable[[asyncio.Task[None]], Any]
) -> asyncio.Task[None]:
    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(when_done)
    return task
