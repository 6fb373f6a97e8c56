"""Requests that wait for earlier ones to end well, and who waits for whom. Pure."""

from __future__ import annotations

import msgspec

from ndif_actor.coordinator.events import Ticket


class _Waiting(msgspec.Struct):
    ticket: Ticket
    for_whom: set[str]
    #: how many will start before it, at least
    position: int


class Followers:
    """Each waits for several others; whoever fails takes those that wait for him along."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Waiting] = {}
        self._followers: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def tickets(self) -> list[Ticket]:
        """Everything that waits, in order of arrival."""
        return [one.ticket for one in self._waiting.values()]

    def position(self, request: str) -> int | None:
        """Return how many requests will start before one that waits, at least."""
        waiting = self._waiting.get(request)
        return None if waiting is None else waiting.position

    def add(self, ticket: Ticket, for_whom: set[str], position: int) -> None:
        """Let a request wait for others, none of which waits for it."""
        self._waiting[ticket.request] = _Waiting(ticket, for_whom, position)
        for other in for_whom:
            self._followers.setdefault(other, []).append(ticket.request)

    def release(self, request: str) -> list[Ticket]:
        """Note that a request has ended well; return those that wait for nobody any more."""
        free = []
        for name in self._followers.pop(request, ()):
            follower = self._waiting.get(name)
            if follower is None:
                continue
            follower.for_whom.discard(request)
            if not follower.for_whom:
                free.append(self._waiting.pop(name).ticket)
        return free

    def fail(self, request: str) -> list[str]:
        """Note that a request has not ended well; return all that can't run for it any more."""
        failed, causes = [], [request]
        while causes:
            for name in self._followers.pop(causes.pop(), ()):
                if self._waiting.pop(name, None) is not None:
                    failed.append(name)
                    causes.append(name)
        return failed

    def remove(self, request: str) -> None:
        """Forget one that waits, if it does; those that wait for it are `fail`'s."""
        self._waiting.pop(request, None)
