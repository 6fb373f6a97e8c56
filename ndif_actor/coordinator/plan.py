"""A forward in the making: who is in it so far, and what is left of its budget."""

from __future__ import annotations

from ndif_actor.coordinator.events import Budget, StartPass, Ticket
from ndif_actor.messages import Forget, Layout, Part, SwapIn, SwapOut


class PassPlan:
    """Members are added until the budget is used up; the first of all may exceed it."""

    def __init__(self, budget: Budget) -> None:
        self._left = budget
        self._aside: tuple[Ticket, int] | None = None
        self.requests: list[str] = []
        self.parts: list[Part] = []
        self.cached: dict[str, list[list[int]]] = {}
        self.before: list[Forget | SwapOut | SwapIn] = []

    @property
    def empty(self) -> bool:
        """Whether nobody is in it."""
        return not self.requests and not self.parts

    @property
    def tokens_left(self) -> int:
        """How many more rows it may have."""
        return self._left.tokens

    def has_room(self, ticket: Ticket, tokens: int) -> bool:
        """Whether a request may join with that many rows."""
        return self._left.fits(ticket, tokens) or (self.empty and self._aside is None)

    def copy(self) -> PassPlan:
        """Return another, as full, to try things out on."""
        twin = PassPlan(self._left)
        twin._aside = self._aside
        twin.requests, twin.parts = list(self.requests), list(self.parts)
        return twin

    def set_aside(self, ticket: Ticket, tokens: int) -> None:
        """Keep room for a request that is added later."""
        self._aside = ticket, tokens
        self._left = self._left.minus(ticket, tokens)

    def free_aside(self) -> None:
        """Give the room back that was set aside."""
        if self._aside is not None:
            ticket, tokens = self._aside
            self._left = Budget(
                self._left.tokens + tokens,
                self._left.nbytes + ticket.nbytes,
                self._left.tensors + ticket.tensors,
            )
            self._aside = None

    def add_trace(self, ticket: Ticket) -> None:
        """Let a trace join."""
        self.requests.append(ticket.request)
        self._left = self._left.minus(ticket, ticket.tokens)

    def add_part(self, ticket: Ticket, part: Part) -> None:
        """Let a generation go on."""
        self.parts.append(part)
        self._left = self._left.minus(ticket, sum(feed.count for feed in part.feeds))

    def add_generation(self, ticket: Ticket, part: Part, cached: list[list[int]]) -> None:
        """Let a generation begin, after the pages of it that are known already."""
        self.requests.append(ticket.request)
        self.cached[ticket.request] = cached
        self.add_part(ticket, part)

    def finish(self, sequence: int, layout: Layout, *, alone: bool) -> StartPass:
        """Return the command that starts it."""
        return StartPass(
            sequence=sequence,
            requests=tuple(self.requests),
            layout=layout,
            parts=tuple(self.parts),
            cached=self.cached,
            before=tuple(self.before),
            alone=alone,
        )
