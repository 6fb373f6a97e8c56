"""Which request runs when: pure decisions, state + event -> state + commands.

A request is in one of these states here, and then forgotten:

    Arrived -> admitting -> Admitted -> queued -> StartPass -> running -> PassFinished

One that comes after others waits for these before it is queued, and fails when one of them does;
then it is queued where it would have been from the beginning, so that it can be in the very next
forward.

The scheduler never touches a tensor, a clock, a socket or a task. Generations that have started go
on in every forward; users take turns to join it, one request a turn, in the order of arrival inside
a user, up to the budget. A user whose next request does not fit keeps his place at the front, so
nobody waits for more forwards than there are users before him: where generations leave no room
for the first of them, the next forward is his before it is theirs, and where pages are short for
a generation, none starts before it. Requests with gradients share forwards of their own, and some
want a forward to themselves: these lanes take turns. An idle replica lingers for a moment when
others have arrived and are still being admitted; a user alone is never made to wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from ndif_actor.coordinator.events import (
    Abandon,
    Accept,
    Admitted,
    AfterFailed,
    Announce,
    Arrived,
    Budget,
    Cancelled,
    Command,
    Drop,
    Event,
    Lane,
    Linger,
    LingerOver,
    PassFinished,
    QueueLimits,
    Reject,
    ReplicaLost,
    ReplicaReady,
    Ticket,
)
from ndif_actor.coordinator.followers import Followers
from ndif_actor.coordinator.generations import Generations, first_tokens
from ndif_actor.coordinator.plan import PassPlan
from ndif_actor.coordinator.turns import Turns
from ndif_actor.messages import Forget, Layout


class SchedulerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the scheduler.

    Attributes:
        admitting: requests being checked and priced.
        queued: requests that wait for a forward, or for others to end before.
        running: requests in the forward that runs now, and generations between two of theirs.
        generations: those of them that are generations.
        free_pages: pages of the KV cache that nobody needs.
        users: users with a request in the queue.
        passes: forwards started since the start.
        held_bytes: bytes that clients sent for all of these requests.
    """

    admitting: int
    queued: int
    running: int
    generations: int
    free_pages: int
    users: int
    passes: int
    held_bytes: int


class _Arrival(msgspec.Struct, frozen=True):
    user: str
    nbytes: int
    number: int


class Scheduler:
    """Decide what to run next; see the module's docstring for the rules."""

    def __init__(self, budget: Budget, limits: QueueLimits, max_swapped_tokens: int = 0) -> None:
        self._budget = budget
        self._limits = limits
        self._known: dict[str, _Arrival] = {}
        self._per_user: dict[str, int] = {}
        self._held_bytes = 0
        self._turns = Turns()
        self._followers = Followers()
        self._arrived = 0
        self._running: set[str] = set()
        self._generations = Generations(max_swapped_tokens)
        #: the request whose turn it was when generations left no room for it
        self._owed: str | None = None
        #: the last forward of each lane, and the last one in which a request alone began
        self._last_of: dict[Lane, int] = {"shared": 0, "gradient": 0, "alone": 0}
        self._last_alone_begun = 0
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
                return [*self._finish_pass(event), *self._start()]
            case ReplicaReady(packed=packed, num_pages=num_pages, page_tokens=page_tokens):
                self._ready, self._packed = True, packed
                self._generations.open(num_pages, page_tokens)
                waiting = [*self._turns.tickets, *self._followers.tickets]
                return [*self._abandon_impossible(waiting), *self._start()]
            case ReplicaLost():
                return self._lose_replica()
        return self._start()

    def statistics(self) -> SchedulerStatistics:
        """Return a snapshot of the counts."""
        queued = len(self._turns) + len(self._followers)
        return SchedulerStatistics(
            admitting=len(self._known) - queued - len(self._running),
            queued=queued,
            running=len(self._running),
            generations=len(self._generations.present),
            free_pages=self._generations.free_pages,
            users=len(self._turns.users),
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
            self._arrived += 1
            self._known[request] = _Arrival(event.user, share, self._arrived)
        self._per_user[event.user] = mine + count
        self._held_bytes += share * count
        return Accept(event.requests)

    def _admit(self, tickets: tuple[Ticket, ...], refused: tuple[str, ...]) -> list[Command]:
        commands: list[Command] = []
        for ticket in tickets:
            if ticket.request not in self._known:  # cancelled while it was being checked
                continue
            commands.append(self._enqueue(ticket))
        for request in refused:
            self._forget(request)
            commands += self._fail_followers(request)
        if self._ready:
            commands += self._abandon_impossible([t for t in tickets if t.request in self._known])
        return commands

    def _enqueue(self, ticket: Ticket) -> Announce:
        """Let a request wait for its turn, or for those that it comes after."""
        before = {request for request in ticket.after if request in self._known}
        if not before:
            return self._queue(ticket)
        running = before <= self._running
        position = 0 if running else 1 + max(self._followers.position(b) or 0 for b in before)
        self._followers.add(ticket, before, position)
        return Announce(ticket.request, position)

    def _queue(self, ticket: Ticket) -> Announce:
        arrival = self._known[ticket.request]
        return self._turns.add(arrival.user, ticket, arrival.number)

    def _release_followers(self, ended: Iterable[str]) -> None:
        """Queue those that have waited for nobody but these, which have ended well."""
        free = [ticket for request in ended for ticket in self._followers.release(request)]
        for ticket in sorted(free, key=lambda ticket: self._known[ticket.request].number):
            self._queue(ticket)
            # Most of them start at once: only the others are told where they are.
            self._turns.unsay(ticket.request)

    def _fail_followers(self, request: str) -> list[Command]:
        followers = tuple(self._followers.fail(request))
        for follower in followers:
            self._forget(follower)
        return [AfterFailed(followers, request)] if followers else []

    def _cancel(self, request: str) -> list[Command]:
        if request not in self._known:
            return []
        self._turns.remove(self._known[request].user, request)
        self._followers.remove(request)
        self._generations.leave(request)
        self._forget(request)
        return [Drop(request), *self._fail_followers(request)]

    def _abandon_impossible(self, tickets: Iterable[Ticket]) -> list[Command]:
        """Give up generations that the replica has no pages for: it had more when they came."""
        fits = self._generations.can_ever_run
        impossible = tuple(ticket.request for ticket in tickets if not fits(ticket))
        for request in impossible:
            self._turns.remove(self._known[request].user, request)
            self._followers.remove(request)
            self._forget(request)
        return self._abandon(impossible)

    def _abandon(self, requests: tuple[str, ...]) -> list[Command]:
        """Give up requests that are forgotten already, and those that come after them."""
        if not requests:
            return []
        failed = [command for request in requests for command in self._fail_followers(request)]
        return [Abandon(requests), *failed]

    def _forget(self, request: str) -> None:
        arrival = self._known.pop(request, None)
        self._running.discard(request)
        if arrival is None:
            return
        self._held_bytes -= arrival.nbytes
        self._per_user[arrival.user] -= 1
        if not self._per_user[arrival.user]:
            del self._per_user[arrival.user]

    # ------------------------------------------------------------ forwards

    def _finish_pass(self, event: PassFinished) -> list[Command]:
        self._in_pass = False
        over = set(self._generations.finish(event))
        gone = [r for r in self._running if r in over or r not in self._generations]
        for request in gone:
            self._forget(request)
        self._release_followers(request for request in gone if request not in event.failed)
        return [command for request in event.failed for command in self._fail_followers(request)]

    def _lose_replica(self) -> list[Command]:
        self._ready = self._lingers = self._in_pass = False
        self._generations.close()
        running = tuple(sorted(self._running))
        for request in running:
            self._forget(request)
        return self._abandon(running)

    def _start_or_linger(self) -> list[Command]:
        if self._in_pass or not self._ready:
            return []
        if not self._turns or self._generations.present or not self.statistics().admitting:
            return self._start()
        if self._lingers:
            return []
        self._lingers = True
        return [Linger(self._sequence + 1)]

    def _start(self) -> list[Command]:
        if not self._ready or self._in_pass:
            return []
        over = self._generations.collect()
        forget = [Forget(over)] if over else []
        plan, alone = self._plan(self._sequence + 1)
        if plan.empty:
            assert not plan.before, "pages move only for the sake of somebody who goes on"
            return [*forget]
        plan.before[:0] = forget
        self._running.update(plan.requests)
        self._sequence += 1
        self._in_pass = True
        self._lingers = False
        layout: Layout = "packed" if self._packed else "dense"
        return [plan.finish(self._sequence, layout, alone=alone), *self._turns.announce()]

    def _plan(self, sequence: int) -> tuple[PassPlan, bool]:
        """Return who is in the next forward, and whether it is one request that asked for that."""
        plan = PassPlan(self._budget)
        if not self._packed:
            self._begin_first(plan)
            return plan, False
        for lane in sorted(self._last_of, key=self._last_of.__getitem__):
            if lane == "shared":
                self._fill_shared(plan, sequence)
            elif lane == "gradient":
                self._join_by_turns(plan, sequence, None, lane)
            else:
                self._fill_alone(plan, sequence)
            if not plan.empty:
                self._last_of[lane] = sequence
                return plan, lane == "alone"
        return plan, False

    def _fill_shared(self, plan: PassPlan, sequence: int) -> None:
        owed = self._turns.find(self._owed)
        self._owed = None
        if owed is not None:
            plan.set_aside(owed, min(owed.tokens, self._share_of_a_prompt(owed)))
        self._generations.go_on(plan, self._generations.shared(), sequence)
        self._generations.bring_back(plan, sequence, shared=True)
        plan.free_aside()
        self._join_by_turns(plan, sequence, owed, "shared")
        if plan.empty:
            self._generations.go_on(plan, self._generations.shared(), sequence)

    def _share_of_a_prompt(self, ticket: Ticket) -> int:
        """Return how many rows are set aside at most for one whose turn has come."""
        return max(1, self._budget.tokens // 2) if first_tokens(ticket) == 1 else ticket.tokens

    def _join_by_turns(
        self, plan: PassPlan, sequence: int, owed: Ticket | None, lane: Lane
    ) -> None:
        """Take requests of a lane out of the queue in turns until no user's next one fits."""
        turns = deque(self._turns.users)
        if owed is not None:
            user = self._known[owed.request].user
            turns.remove(user)
            turns.appendleft(user)
        pages_are_owed = served = False
        while turns:
            user = turns.popleft()
            ticket = self._turns.first(user)
            if ticket.lane != lane:
                pages_are_owed |= not self._has_pages(plan, ticket)
                continue
            if not plan.has_room(ticket, first_tokens(ticket)):
                if not served and self._owed is None and lane == "shared":
                    self._owed = ticket.request
                continue
            if ticket.continuation is None:
                plan.add_trace(ticket)
            elif pages_are_owed or not self._generations.join(plan, ticket, sequence):
                pages_are_owed = True
                continue
            served = True
            if self._turns.take(user):
                turns.append(user)

    def _fill_alone(self, plan: PassPlan, sequence: int) -> None:
        self._let_one_go_on(plan, sequence)
        self._generations.bring_back(plan, sequence, shared=False)
        if plan.empty:
            self._let_one_go_on(plan, sequence)

    def _let_one_go_on(self, plan: PassPlan, sequence: int) -> None:
        """Begin the next request that wants a forward to itself, or go on with one, in turns."""
        running = self._generations.next_alone()
        begin_first = running is None or self._last_alone_begun < running.last_fed
        for begin in (begin_first, not begin_first):
            if begin and self._begin_alone(plan, sequence):
                self._last_alone_begun = sequence
            elif not begin and running is not None:
                self._generations.go_on(plan, [running], sequence)
            if not plan.empty:
                return

    def _begin_alone(self, plan: PassPlan, sequence: int) -> bool:
        pages_are_owed = False
        for user in self._turns.users:
            ticket = self._turns.first(user)
            if not ticket.alone:
                pages_are_owed |= not self._has_pages(plan, ticket)
                continue
            if ticket.continuation is None:
                plan.add_trace(ticket)
            elif pages_are_owed or not self._generations.join(plan, ticket, sequence):
                pages_are_owed = True
                continue
            self._turns.take(user)
            return True
        return False

    def _begin_first(self, plan: PassPlan) -> None:
        if self._turns:
            user = self._turns.users[0]
            plan.add_trace(self._turns.first(user))
            self._turns.take(user)

    def _has_pages(self, plan: PassPlan, ticket: Ticket) -> bool:
        return ticket.continuation is None or self._generations.could_join(plan, ticket)
