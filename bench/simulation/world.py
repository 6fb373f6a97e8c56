"""A server with users around it, on a virtual clock.

The scheduler, the queue's limits, the prices of requests, the lingering and the advice to refused
clients are the server's own code; only forwards and the checking of requests take modelled times.
Nothing reads a real clock, and everything that is drawn comes from the seed.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

import msgspec
import numpy as np
from msgspec.structs import replace

from bench.simulation.cost import ForwardCost, Load
from bench.simulation.workload import Kind, Prices, User, draw
from ndif_actor.coordinator import events
from ndif_actor.coordinator.pace import Pace
from ndif_actor.coordinator.scheduler import Scheduler


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated.

    Attributes:
        cost: of a forward.
        budget, limits: as the server is configured.
        num_pages, page_tokens: its KV cache.
        max_swapped_tokens: of KV cache in the host's memory.
        admission_s: checking and pricing one request, one after the other.
        reply_s: from the end of a request's last forward until its client has the result.
        knows_users: users take turns; otherwise all wait in one line.
        serial: a request reaches the scheduler only when the one before it has ended.
    """

    cost: ForwardCost
    budget: events.Budget
    limits: events.QueueLimits
    num_pages: int
    page_tokens: int = 16
    max_swapped_tokens: int = 1 << 20
    admission_s: float = 0.002
    reply_s: float = 0.002
    knows_users: bool = True
    serial: bool = False


class Served(msgspec.Struct, kw_only=True):
    """What became of one request; times are in seconds since the beginning.

    Attributes:
        user, group, kind: who sent what.
        tokens, new_tokens: of its prompt, and to be generated.
        sent_s: when its user wanted it.
        started_s, first_s, ended_s: its first forward, its first token or result, its end; None
            where that has not come.
        refusals: how often the server had no room for it.
    """

    user: str
    group: str
    kind: str
    tokens: int
    new_tokens: int
    sent_s: float
    started_s: float | None = None
    first_s: float | None = None
    ended_s: float | None = None
    refusals: int = 0


class Forward(msgspec.Struct, frozen=True):
    """One forward: when it started, how long it took, and what it carried."""

    start_s: float
    seconds: float
    load: Load


class History(msgspec.Struct, frozen=True):
    """All that happened."""

    requests: list[Served]
    forwards: list[Forward]
    duration_s: float


class _Going(msgspec.Struct):
    """A generation: how many of its tokens are in the KV cache, and how many it has made."""

    done: int
    made: int = 0


class World:
    """Users, a server, and the clock.

    Args:
        server: what is simulated.
        prices: of requests.
        kinds: of requests, by name.
        users: how many there are of each kind of user.
        seed: of everything that is drawn.
    """

    def __init__(
        self,
        server: Server,
        prices: Prices,
        kinds: Sequence[Kind],
        users: Sequence[tuple[User, int]],
        seed: int,
    ) -> None:
        self._server = server
        self._prices = prices
        self._kinds = {kind.name: kind for kind in kinds}
        self._scheduler = Scheduler(server.budget, server.limits, server.max_swapped_tokens)
        self._pace = Pace()
        self._now = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._numbers = count()
        self._admission_free_s = 0.0
        self._requests: dict[str, Served] = {}
        self._tickets: dict[str, events.Ticket] = {}
        self._going: dict[str, _Going] = {}
        self._awaited: dict[str, set[str]] = {}
        self._line: deque[tuple[str, events.Ticket]] = deque()
        self._history = History([], [], 0.0)
        self._people = {
            f"{user.name}-{number}": (user, np.random.default_rng([seed, kind, number]))
            for kind, (user, many) in enumerate(users)
            for number in range(many)
        }

    def run(self, duration_s: float) -> History:
        """Let so much time pass; return all that was sent in it, ended or not."""
        ready = events.ReplicaReady(True, self._server.num_pages, self._server.page_tokens)
        self._tell(ready)
        for name, (user, rng) in self._people.items():
            self._later(rng.uniform(0, user.think_s), partial(self._act, name))
        while self._agenda and self._agenda[0][0] <= duration_s:
            self._now, _, action = heapq.heappop(self._agenda)
            action()
        return replace(self._history, duration_s=duration_s)

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self._now + delay_s, next(self._order), action))

    # ------------------------------------------------------------ users

    def _act(self, name: str) -> None:
        """Let a user send what he wants next; when all of it has ended, he thinks."""
        user, rng = self._people[name]
        tickets = []
        for kind, length, new_tokens in draw(user, self._kinds, rng):
            request = f"{name}/{next(self._numbers)}"
            tickets.append(ticket := self._ticket(request, kind.name, length))
            self._requests[request] = served = Served(
                user=name,
                group=user.name,
                kind=kind.name,
                tokens=ticket.tokens,
                new_tokens=new_tokens,
                sent_s=self._now,
            )
            self._history.requests.append(served)
        self._awaited[name] = {ticket.request for ticket in tickets}
        self._submit(name, tickets)

    def _ticket(self, request: str, kind: str, length: int) -> events.Ticket:
        ticket = replace(self._prices.ticket(kind, length), request=request)
        if ticket.continuation is None:
            return ticket
        # Prompts of different requests have nothing in common.
        own = replace(ticket.continuation, sharing=next(self._numbers))
        return replace(ticket, continuation=own)

    def _submit(self, user: str, tickets: list[events.Ticket]) -> None:
        if not self._server.serial:
            self._arrive(user, tickets)
            return
        self._line += [(user, ticket) for ticket in tickets]
        if not self._tickets:
            self._serve_next()

    def _serve_next(self) -> None:
        if self._line:
            user, ticket = self._line.popleft()
            self._arrive(user, [ticket])

    def _arrive(self, user: str, tickets: list[events.Ticket]) -> None:
        names = tuple(ticket.request for ticket in tickets)
        line = user if self._server.knows_users else "everybody"
        (answer,) = self._scheduler.handle(events.Arrived(names, line))
        if isinstance(answer, events.Reject):
            for name in names:
                self._requests[name].refusals += 1
            wait_s = self._pace.wait_s(self._scheduler.statistics().queued)
            self._later(wait_s, partial(self._arrive, user, tickets))
            return
        began = max(self._now, self._admission_free_s)
        self._admission_free_s = began + len(tickets) * self._server.admission_s
        for ticket in tickets:
            self._tickets[ticket.request] = ticket
        checked = events.Admitted(tuple(tickets))
        self._later(self._admission_free_s - self._now, partial(self._tell, checked))

    # ------------------------------------------------------------ the server

    def _tell(self, event: events.Event) -> None:
        for command in self._scheduler.handle(event):
            match command:
                case events.StartPass():
                    self._start(command)
                case events.Linger(sequence=sequence):
                    over = partial(self._tell, events.LingerOver(sequence))
                    self._later(self._pace.linger_s(), over)

    def _start(self, start: events.StartPass) -> None:
        for request in start.requests:
            self._requests[request].started_s = self._now
            if self._tickets[request].continuation is not None:
                cached = sum(map(len, start.cached[request]))
                self._going[request] = _Going(cached * self._server.page_tokens)
        load = self._load(start)
        seconds = self._server.cost.seconds(load)
        self._history.forwards.append(Forward(self._now, seconds, load))
        self._later(seconds, partial(self._finish, start, seconds))

    def _load(self, start: events.StartPass) -> Load:
        traces = [self._tickets[request] for request in start.requests]
        traces = [ticket for ticket in traces if ticket.continuation is None]
        fed = sum(feed.count for part in start.parts for feed in part.feeds)
        return Load(
            rows=fed + sum(ticket.tokens for ticket in traces),
            requests=len(start.members),
            context=sum(self._going[part.request].done for part in start.parts),
            differentiated=any(ticket.lane == "gradient" for ticket in traces),
        )

    def _finish(self, start: events.StartPass, seconds: float) -> None:
        self._pace.note(len(start.members), seconds)
        grown, ended = [], [r for r in start.requests if r not in self._going]
        for part in start.parts:
            grown.append(self._grow(part.request, part.feeds[0].count))
            if grown[-1].finished == (True,):
                ended.append(part.request)
        last = {one.request for one in grown if one.finished == (True,)}
        going_on = tuple(one for one in grown if one.request not in last)
        self._tell(events.PassFinished(start.sequence, going_on, tuple(ended)))
        for request in ended:
            self._later(self._server.reply_s, partial(self._end, request))

    def _grow(self, request: str, count: int) -> events.Grown:
        """Return what a forward has made of a generation that was fed so many tokens."""
        served, going = self._requests[request], self._going[request]
        going.done += count
        if going.done < served.tokens + going.made:
            return events.Grown(request, (None,), (False,))
        going.made += 1
        if served.first_s is None:
            served.first_s = self._now + self._server.reply_s
        return events.Grown(request, (1,), (going.made >= served.new_tokens,))

    def _end(self, request: str) -> None:
        served = self._requests.pop(request)
        del self._tickets[request]
        self._going.pop(request, None)
        served.ended_s = self._now
        if served.first_s is None:
            served.first_s = self._now
        if self._server.serial:
            self._serve_next()
        awaited = self._awaited[served.user]
        awaited.remove(request)
        if not awaited:
            user, rng = self._people[served.user]
            self._later(rng.exponential(user.think_s), partial(self._act, served.user))


def simulate(
    server: Server,
    prices: Prices,
    kinds: Sequence[Kind],
    users: Sequence[tuple[User, int]],
    *,
    duration_s: float,
    seed: int,
) -> History:
    """Return what happens on a server in some time; see `World`."""
    return World(server, prices, kinds, users, seed).run(duration_s)
