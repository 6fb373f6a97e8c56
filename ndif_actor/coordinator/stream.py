"""The events of one submission on their way to the client that waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from ndif_actor.coordinator.results import Outgoing
from ndif_client.wire.messages import Done, Failed, Queued


class EventStream:
    """A queue of events with one reader, which ends when every request has ended.

    A newer position of a request replaces the one that has not been taken yet; everything else
    happens once per request, or once per token. Without a reader everything is let go.
    """

    def __init__(self, requests: Iterable[str]) -> None:
        self._open = set(requests)
        self._positions: dict[str, Outgoing] = {}
        self._others: list[Outgoing] = []
        self._wakeup: asyncio.Event = asyncio.Event()
        self._closed = False

    def push(self, outgoing: Outgoing) -> None:
        """Add an event; the stream holds its memory until the reader has written it."""
        if self._closed:
            return
        event = outgoing.event
        if isinstance(event, Queued):
            self._positions[event.id] = outgoing
        else:
            self._others.append(outgoing)
        if isinstance(event, Done | Failed):
            self._open.discard(event.id)
        outgoing.hold()
        self._wakeup.set()

    async def batches(self) -> AsyncIterator[list[Outgoing]]:
        """Yield whatever is waiting, as lists, until all requests have ended.

        The reader drops each event's memory when it has been written.
        """
        while self._open or self._others:
            await self._wakeup.wait()
            self._wakeup.clear()
            # A position is always older than anything else that waits for the same request.
            batch = [*self._positions.values(), *self._others]
            self._positions, self._others = {}, []
            yield batch

    def close(self) -> None:
        """Let everything go that was not taken, and whatever may still come."""
        self._closed = True
        for outgoing in self._others:
            outgoing.drop()
        self._positions.clear()
        self._others.clear()
