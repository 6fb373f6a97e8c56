"""Which request runs when: pure decisions, state + event -> state + commands.

A request is in one of three states here, and then forgotten:

    Arrived -> admitting -> Admitted -> queued -> StartPass -> running -> PassFinished

The scheduler never touches a tensor, a clock, a socket or a task. Users take turns, one request a
turn, first in first out inside a user; whatever waits when a forward can start shares it, up to
the budget. A user whose next request does not fit keeps his place at the front, so nobody waits
for more forwards than there are users before him. An idle replica lingers for a moment when
others have arrived and are still being admitted; a user alone is never made to wait.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

import msgspec

from ndif_actor.coordinator.events import (
    Abandon,
    Accept,
    Admitted,
    Announce,
    Arrived,
    Budget,
    Cancelled,
    Command,
    Drop,
    Event,
    Linger,
    LingerOver,
    PassFinished,
    QueueLimits,
    Reject,
    ReplicaLost,
    ReplicaReady,
    StartPass,
    Ticket,
)


class SchedulerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the scheduler.

    Attributes:
        admitting: requests being checked and priced.
        queued: requests that wait for a forward.
        running: requests in the forward that runs now.
        users: users with a request in the queue.
        passes: forwards started since the start.
        held_bytes: bytes that clients sent for all of these requests.
    """

    admitting: int
    queued: int
    running: int
    users: int
    passes: int
    held_bytes: int


class _Arrival(msgspec.Struct, frozen=True):
    user: str
    nbytes: int


class Scheduler:
    """Decide what to run next; see the module's docstring for the rules."""

    def __init__(self, budget: Budget, limits: QueueLimits) -> None:
        self._budget = budget
        self._limits = limits
        self._known: dict[str, _Arrival] = {}
        self._per_user: dict[str, int] = {}
        self._held_bytes = 0
        #: users with something queued, in the order of their next turns
        self._turns: OrderedDict[str, deque[Ticket]] = OrderedDict()
        self._queued: dict[str, Ticket] = {}
        self._positions: dict[str, int] = {}
        self._running: set[str] = set()
        self._sequence = 0
        self._in_pass = False
        self._lingers = False
        self._ready = False
        self._packed = True

    def handle(self, event: Event) -> list[Command]:
        """Take one event in and return what is to be done about it, in order."""
        match event:
            case Arrived():
                return [self._arrive(event)]
            case Admitted(tickets=tickets, refused=refused):
                return [*self._admit(tickets, refused), *self._start_or_linger()]
            case Cancelled(request=request):
                return [*self._cancel(request), *self._start_or_linger()]
            case LingerOver(sequence=sequence):
                if sequence != self._sequence + 1:
                    return []
                self._lingers = False
            case PassFinished(sequence=sequence):
                if not self._in_pass or sequence != self._sequence:
                    return []
                self._finish_pass()
            case ReplicaReady(packed=packed):
                self._ready, self._packed = True, packed
            case ReplicaLost():
                return self._lose_replica()
        return self._start()

    def statistics(self) -> SchedulerStatistics:
        """Return a snapshot of the counts."""
        return SchedulerStatistics(
            admitting=len(self._known) - len(self._queued) - len(self._running),
            queued=len(self._queued),
            running=len(self._running),
            users=len(self._turns),
            passes=self._sequence,
            held_bytes=self._held_bytes,
        )

    # ------------------------------------------------------------ arrival and departure

    def _arrive(self, event: Arrived) -> Command:
        count, limits = len(event.requests), self._limits
        known = next((r for r in event.requests if r in self._known), None)
        if known is not None:
            return Reject(event.requests, "known", f"request {known} is already here")
        if len(self._known) + count > limits.max_requests:
            held = f"{len(self._known)} of at most {limits.max_requests} requests"
            return Reject(event.requests, "busy", f"this server already holds {held}")
        mine = self._per_user.get(event.user, 0)
        if mine + count > limits.max_requests_per_user:
            held = f"{mine} of at most {limits.max_requests_per_user} requests a user"
            return Reject(event.requests, "busy", f"you already have {held} here")
        if self._known and self._held_bytes + event.nbytes > limits.max_bytes:
            held = f"{self._held_bytes} of at most {limits.max_bytes} bytes"
            return Reject(event.requests, "busy", f"waiting requests already hold {held}")
        share = event.nbytes // count
        for request in event.requests:
            self._known[request] = _Arrival(event.user, share)
        self._per_user[event.user] = mine + count
        self._held_bytes += share * count
        return Accept(event.requests)

    def _admit(self, tickets: tuple[Ticket, ...], refused: tuple[str, ...]) -> list[Command]:
        for request in refused:
            self._forget(request)
        announced: list[Command] = []
        for ticket in tickets:
            if ticket.request not in self._known:  # cancelled while it was being checked
                continue
            user = self._known[ticket.request].user
            self._turns.setdefault(user, deque()).append(ticket)
            self._queued[ticket.request] = ticket
            self._positions[ticket.request] = position = self._last_position(user)
            announced.append(Announce(ticket.request, position))
        return announced

    def _cancel(self, request: str) -> list[Command]:
        if request not in self._known:
            return []
        ticket = self._queued.pop(request, None)
        if ticket is not None:
            user = self._known[request].user
            self._turns[user].remove(ticket)
            if not self._turns[user]:
                del self._turns[user]
        self._forget(request)
        return [Drop(request)]

    def _forget(self, request: str) -> None:
        arrival = self._known.pop(request, None)
        self._running.discard(request)
        self._positions.pop(request, None)
        if arrival is None:
            return
        self._held_bytes -= arrival.nbytes
        self._per_user[arrival.user] -= 1
        if not self._per_user[arrival.user]:
            del self._per_user[arrival.user]

    # ------------------------------------------------------------ forwards

    def _finish_pass(self) -> None:
        self._in_pass = False
        for request in list(self._running):
            self._forget(request)

    def _lose_replica(self) -> list[Command]:
        self._ready = self._lingers = False
        running = tuple(sorted(self._running))
        self._finish_pass()
        return [Abandon(running)] if running else []

    def _start_or_linger(self) -> list[Command]:
        if self._in_pass or not self._ready or not self._turns:
            return []
        if not self.statistics().admitting:
            return self._start()
        if self._lingers:
            return []
        self._lingers = True
        return [Linger(self._sequence + 1)]

    def _start(self) -> list[Command]:
        if not self._ready or self._in_pass or not self._turns:
            return []
        chosen = list(self._choose())
        for ticket in chosen:
            del self._queued[ticket.request]
            self._positions.pop(ticket.request, None)
            self._running.add(ticket.request)
        self._sequence += 1
        self._in_pass = True
        self._lingers = False
        start = StartPass(
            sequence=self._sequence,
            requests=tuple(ticket.request for ticket in chosen),
            layout="packed" if self._packed else "dense",
        )
        return [start, *self._announce()]

    def _choose(self) -> Iterator[Ticket]:
        """Take requests out of the queue in turns until no user's next one fits."""
        left = self._budget
        turns = deque(self._turns)
        first = True
        while turns:
            user = turns.popleft()
            queue = self._turns[user]
            if not first and not left.fits(queue[0]):
                continue
            ticket = queue.popleft()
            if queue:
                self._turns.move_to_end(user)
                turns.append(user)
            else:
                del self._turns[user]
            yield ticket
            first = False
            left = left.minus(ticket)
            if not self._packed:
                return

    def _last_position(self, user: str) -> int:
        """Return how many requests start before the last one of `user`, if all were equal."""
        rounds = len(self._turns[user]) - 1
        position, before = rounds, 1
        for other, queue in self._turns.items():
            if other == user:
                before = 0
            else:
                position += min(len(queue), rounds + before)
        return position

    def _announce(self) -> list[Command]:
        """Tell the requests whose position in the fair order has changed."""
        changed: list[Command] = []
        for position, request in enumerate(self._fair_order()):
            if self._positions.get(request) != position:
                self._positions[request] = position
                changed.append(Announce(request, position))
        return changed

    def _fair_order(self) -> Iterator[str]:
        queues = [iter(queue) for queue in self._turns.values()]
        while queues:
            waiting = []
            for queue in queues:
                ticket = next(queue, None)
                if ticket is not None:
                    yield ticket.request
                    waiting.append(queue)
            queues = waiting
