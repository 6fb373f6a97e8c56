"""The queue: users take turns, and inside a user requests go in the order of their arrival."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from ndif_actor.coordinator.events import Announce, Ticket


class Turns:
    """Requests that wait, by user, in the order of the users' next turns."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[Ticket]] = OrderedDict()
        self._tickets: dict[str, Ticket] = {}
        #: when each request arrived
        self._arrivals: dict[str, int] = {}
        #: what each request was told last
        self._positions: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def users(self) -> list[str]:
        """Everyone who waits, whose turn is next first."""
        return list(self._queues)

    @property
    def tickets(self) -> list[Ticket]:
        """Everything that waits."""
        return list(self._tickets.values())

    def find(self, request: str | None) -> Ticket | None:
        """Return the ticket of a request that waits."""
        return None if request is None else self._tickets.get(request)

    def first(self, user: str) -> Ticket:
        """Return the next request of a user who waits."""
        return self._queues[user][0]

    def add(self, user: str, ticket: Ticket, arrival: int) -> Announce:
        """Let a request wait; return what it is to be told.

        Args:
            user: whose it is.
            ticket: of the request.
            arrival: its number in the order of arrival, in which a user's requests start.
        """
        queue = self._queues.setdefault(user, deque())
        place = len(queue)
        while place and self._arrivals[queue[place - 1].request] > arrival:
            place -= 1
        queue.insert(place, ticket)
        self._tickets[ticket.request] = ticket
        self._arrivals[ticket.request] = arrival
        self._positions[ticket.request] = position = self._position(user, place)
        return Announce(ticket.request, position)

    def unsay(self, request: str) -> None:
        """Let the next `announce` tell a request where it is, whatever it was told before."""
        self._positions[request] = -1

    def take(self, user: str) -> bool:
        """Take out a user's next request, which was his turn; return whether he has another."""
        queue = self._queues[user]
        self._let_go(queue.popleft())
        if queue:
            self._queues.move_to_end(user)
        else:
            del self._queues[user]
        return bool(queue)

    def remove(self, user: str, request: str) -> None:
        """Take out a request out of turn, if it waits."""
        ticket = self._tickets.get(request)
        if ticket is None:
            return
        self._queues[user].remove(ticket)
        if not self._queues[user]:
            del self._queues[user]
        self._let_go(ticket)

    def announce(self) -> list[Announce]:
        """Tell the requests whose position in the fair order has changed."""
        changed = []
        for position, request in enumerate(self._fair_order()):
            if self._positions[request] != position:
                self._positions[request] = position
                changed.append(Announce(request, position))
        return changed

    def _let_go(self, ticket: Ticket) -> None:
        del self._tickets[ticket.request]
        del self._arrivals[ticket.request]
        del self._positions[ticket.request]

    def _position(self, user: str, rounds: int) -> int:
        """Return how many requests start before this one of `user`, if all were equal."""
        position, before = rounds, 1
        for other, queue in self._queues.items():
            if other == user:
                before = 0
            else:
                position += min(len(queue), rounds + before)
        return position

    def _fair_order(self) -> Iterator[str]:
        queues = [iter(queue) for queue in self._queues.values()]
        while queues:
            waiting = []
            for queue in queues:
                ticket = next(queue, None)
                if ticket is not None:
                    yield ticket.request
                    waiting.append(queue)
            queues = waiting
