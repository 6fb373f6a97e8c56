"""Finished requests, kept so that they can be fetched again: for a time, within a bound of bytes.

Saved values lie in memory that a shard filled (usually shared with it) and are never copied here;
that memory goes back when the last holder, the store or a reply being written, lets go of it.
Time comes from outside, so that tests need no clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import msgspec

from ndif_client.wire.messages import Done, Event, Failed


class Memory:
    """Buffers received from a shard, given back when nobody holds them any more.

    `with memory:` holds it meanwhile.
    """

    def __init__(self, nbytes: int, give_back: Callable[[], None]) -> None:
        self.nbytes = nbytes
        self._give_back = give_back
        self._holders = 0

    def __enter__(self) -> None:
        self.hold()

    def __exit__(self, *_: object) -> None:
        self.drop()

    def hold(self) -> None:
        """Keep the buffers valid until the matching `drop`."""
        self._holders += 1

    def drop(self) -> None:
        """Let go; the last one to do so gives the memory back."""
        assert self._holders > 0, "memory was dropped more often than it was held"
        self._holders -= 1
        if not self._holders:
            self._give_back()


class Outgoing(msgspec.Struct, frozen=True, kw_only=True):
    """An event on its way to a client, with the buffers of its frame.

    Whoever passes one on to be written or kept holds its `memories` first.
    """

    event: Event
    buffers: list[memoryview] = []
    memories: tuple[Memory, ...] = ()

    def hold(self) -> None:
        for memory in self.memories:
            memory.hold()

    def drop(self) -> None:
        for memory in self.memories:
            memory.drop()


class StoreStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the store: results in it, their bytes, and how many the bound pushed out."""

    results: int
    nbytes: int
    evicted: int


class _Kept(msgspec.Struct):
    owner: str
    outgoing: Outgoing
    nbytes: int
    expires_s: float


#: What a result counts for beside its buffers: its header and our own records, and its tokens.
RECORD_BYTES = 1024
TOKEN_BYTES = 128

#: Entries of the list of delivered results that may be out of date before it is cleaned.
_SLACK = 64


class ResultStore:
    """Keep finished requests by id for their owner.

    When the bound is exceeded, delivered results go first, the largest of them first; then those
    nobody has fetched yet, the oldest first.
    """

    def __init__(self, ttl_s: float, max_bytes: int) -> None:
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._kept: dict[str, _Kept] = {}
        #: delivered results, the largest first; may name some that have gone since
        self._delivered: list[tuple[int, str]] = []
        self._nbytes = 0
        self._evicted = 0

    def __contains__(self, request: str) -> bool:
        return request in self._kept

    def put(self, owner: str, outgoing: Outgoing, now: float) -> None:
        """Keep a finished request; the store takes a hold of its memory."""
        if not isinstance(outgoing.event, Done | Failed):
            raise TypeError(f"{type(outgoing.event).__name__} is no result")
        nbytes = _weight(outgoing)
        outgoing.hold()
        self.forget(outgoing.event.id)
        self._kept[outgoing.event.id] = _Kept(owner, outgoing, nbytes, now + self._ttl_s)
        self._nbytes += nbytes
        self._make_room()

    def get(self, request: str, owner: str) -> Outgoing | None:
        """Return the result of `request` if it is kept and belongs to `owner`."""
        kept = self._kept.get(request)
        return kept.outgoing if kept is not None and kept.owner == owner else None

    def mark_delivered(self, request: str) -> None:
        """Note that the client has received all of it, so it may go before others."""
        kept = self._kept.get(request)
        if kept is not None:
            heapq.heappush(self._delivered, (-kept.nbytes, request))
            if len(self._delivered) > 2 * len(self._kept) + _SLACK:
                present = {entry for entry in self._delivered if entry[1] in self._kept}
                self._delivered = sorted(present)

    def forget(self, request: str) -> None:
        """Drop one result, if it is kept."""
        kept = self._kept.pop(request, None)
        if kept is not None:
            self._nbytes -= kept.nbytes
            kept.outgoing.drop()

    def expire(self, now: float) -> None:
        """Drop everything whose time is over (results are kept in order of arrival)."""
        while self._kept:
            request, kept = next(iter(self._kept.items()))
            if kept.expires_s > now:
                return
            self.forget(request)

    def next_expiry(self) -> float | None:
        """Return when `expire` will have something to do, on the same clock."""
        return next((kept.expires_s for kept in self._kept.values()), None)

    def clear(self) -> None:
        """Drop everything."""
        for request in list(self._kept):
            self.forget(request)

    def statistics(self) -> StoreStatistics:
        """Return a snapshot of the counts."""
        return StoreStatistics(results=len(self._kept), nbytes=self._nbytes, evicted=self._evicted)

    def _make_room(self) -> None:
        while self._nbytes > self._max_bytes:
            while self._delivered and self._delivered[0][1] not in self._kept:
                heapq.heappop(self._delivered)
            oldest = next(iter(self._kept))
            self.forget(heapq.heappop(self._delivered)[1] if self._delivered else oldest)
            self._evicted += 1


def _weight(outgoing: Outgoing) -> int:
    """Return the bytes that keeping an event takes, roughly."""
    nbytes = RECORD_BYTES + sum(buffer.nbytes for buffer in outgoing.buffers)
    if isinstance(outgoing.event, Done):
        num_ids = sum(len(text.ids) for invoke in outgoing.event.prompts for text in invoke)
        num_ids += sum(len(text.ids) for invoke in outgoing.event.completions for text in invoke)
        nbytes += TOKEN_BYTES * num_ids
    return nbytes
