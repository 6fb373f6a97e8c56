"""The generations that have started: what they feed next, and where their KV cache lies.

    join -> on the device <-> swapped out -> ended or cancelled -> Forget

They stand in the order in which they started. Pages that an older one needs are taken from the
youngest, whose KV cache moves to the host's memory as a whole; the oldest of those comes back
first, and nobody starts meanwhile, so the ones swapped out are always the youngest. Whoever starts
must fit even if all grow as long as they may: the oldest, as many as then fit on the device
together, stay there for ever, and the host's memory has room for all the others. So there is always
one that can go on, and nothing ever overflows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from ndif_actor.coordinator.events import Continuation, Grown, PassFinished, Ticket
from ndif_actor.coordinator.pages import Chain, PagePool
from ndif_actor.coordinator.plan import PassPlan
from ndif_actor.messages import Feed, Part, SwapIn, SwapOut


class SequenceState(msgspec.Struct, kw_only=True):
    """One sequence of a generation.

    Attributes:
        ids: its prompt and the tokens that it has got since.
        prompt_tokens: how many of them are the prompt's.
        done: how many of them are in the KV cache.
        pages: where these lie.
        fed: how many the forward that runs now is fed.
        registered: how many of its pages others may have found, or may not.
    """

    ids: list[int]
    prompt_tokens: int
    chain: Chain
    done: int = 0
    pages: list[int] = []
    fed: int = 0
    registered: int = 0
    finished: bool = False

    @property
    def pending(self) -> int:
        """How many known tokens have not been fed."""
        return len(self.ids) - self.done


class Generation(msgspec.Struct, kw_only=True):
    """A generation that has started.

    Attributes:
        worst: pages it has when all its sequences are as long as they may be.
        last_fed: the number of the last forward it was in.
        swapped_pages: how many pages each sequence has in the host's memory, if it lies there.
        leaving: it is over, but the forward that runs now may have it.
    """

    ticket: Ticket
    continuation: Continuation
    sequences: list[SequenceState]
    worst: int
    last_fed: int = 0
    swapped_pages: list[int] | None = None
    leaving: bool = False

    @property
    def prefilling(self) -> bool:
        """Whether some of its prompt has not been fed."""
        return any(one.done < one.prompt_tokens for one in self.sequences)

    @property
    def num_pages(self) -> int:
        """How many pages it has, here or there."""
        return sum(self.swapped_pages or [len(one.pages) for one in self.sequences])


class Generations:
    """All generations that have started on the replica that runs now.

    Args:
        max_swapped_tokens: of KV cache in the host's memory.
    """

    def __init__(self, max_swapped_tokens: int) -> None:
        self._max_swapped_tokens = max_swapped_tokens
        self._pool = PagePool(0, 1)
        self._started: dict[str, Generation] = {}
        #: of those that could not start yet: long prompts shall be digested once
        self._chains: dict[str, list[Chain]] = {}

    # ------------------------------------------------------------ who is here

    def __contains__(self, request: str) -> bool:
        return request in self._started

    @property
    def present(self) -> list[str]:
        """All that have started and go on."""
        return [name for name, one in self._started.items() if not one.leaving]

    @property
    def free_pages(self) -> int:
        """Pages nobody needs."""
        return self._pool.free

    def shared(self) -> list[Generation]:
        """Return those that may share a forward now."""
        return [one for one in self._here() if not one.ticket.alone]

    def next_alone(self) -> Generation | None:
        """Return the one that wants a forward to itself and has waited for it the longest."""
        waiting = (one for one in self._here() if one.ticket.alone)
        return min(waiting, key=lambda one: one.last_fed, default=None)

    def _here(self) -> Iterator[Generation]:
        return (one for one in self._started.values() if one.swapped_pages is None)

    def _swapped(self) -> list[Generation]:
        return [one for one in self._started.values() if one.swapped_pages is not None]

    # ------------------------------------------------------------ beginnings and ends

    def open(self, num_pages: int, page_tokens: int) -> None:
        """Begin anew with an empty cache of that size."""
        self._started, self._chains = {}, {}
        self._pool = PagePool(num_pages, page_tokens)

    def close(self) -> None:
        """Let go of everything: the replica is lost."""
        self.open(0, 1)

    def can_ever_run(self, ticket: Ticket) -> bool:
        """Whether the whole cache is large enough for a generation."""
        return ticket.continuation is None or self._worst(ticket.continuation) <= (
            self._pool.num_pages
        )

    def join(self, plan: PassPlan, ticket: Ticket, sequence: int) -> bool:
        """Let a generation start with forward `sequence`, if there are pages for it.

        The plan must have room for `first_tokens` of it.
        """
        started = self._try_to_begin(plan, ticket)
        if started is None:
            return False
        del self._chains[ticket.request]
        cached = [list(one.pages) for one in started.sequences]
        feeds = self._feeds(plan, started)
        wanted = self._pages_for(started, feeds)
        self._started[ticket.request] = started
        plan.add_generation(ticket, self._feed(started, feeds, wanted, sequence), cached)
        return True

    def could_join(self, plan: PassPlan, ticket: Ticket) -> bool:
        """Whether there are pages for a generation to start."""
        started = self._try_to_begin(plan, ticket)
        if started is None:
            return False
        self._release(started)
        return True

    def _try_to_begin(self, plan: PassPlan, ticket: Ticket) -> Generation | None:
        """Return the generation with the pages it finds in the cache, or None if it can't start."""
        new = ticket.continuation
        assert new is not None
        if self._swapped() or not self._all_fit(worst := self._worst(new)):
            return None
        started = self._begin(ticket, new, worst)
        wanted = self._pages_for(started, self._feeds(plan, started))
        if sum(wanted) + self._growth_of_others() <= self._pool.free:
            return started
        self._release(started)
        return None

    def leave(self, request: str) -> None:
        """Note that a generation is over; `collect` lets go of it."""
        self._chains.pop(request, None)
        if request in self._started:
            self._started[request].leaving = True

    def collect(self) -> list[str]:
        """Let go of those that are over and return them; no forward runs."""
        over = [name for name, one in self._started.items() if one.leaving]
        for name in over:
            self._release(self._started.pop(name))
        return over

    def finish(self, event: PassFinished) -> list[str]:
        """Take in what a forward has made; return the generations that have ended with it."""
        for grown in event.grown:
            if grown.request in self._started:
                self._grow(self._started[grown.request], grown)
        for name in event.ended:
            self.leave(name)
        return [name for name in self._started if self._started[name].leaving]

    def _begin(self, ticket: Ticket, new: Continuation, worst: int) -> Generation:
        chains = self._chains.get(ticket.request)
        if chains is None:
            chains = [Chain(new.sharing, self._pool.page_tokens) for _ in new.prompts]
            self._chains[ticket.request] = chains
        sequences = []
        for ids, chain in zip(new.prompts, chains, strict=True):
            pages = self._pool.match(chain, ids) if new.takes_cached else []
            sequences.append(
                SequenceState(
                    ids=list(ids),
                    prompt_tokens=len(ids),
                    chain=chain,
                    done=len(pages) * self._pool.page_tokens,
                    pages=pages,
                    registered=len(pages),
                )
            )
        return Generation(ticket=ticket, continuation=new, sequences=sequences, worst=worst)

    def _grow(self, one: Generation, grown: Grown) -> None:
        for sequence, token, finished in zip(
            one.sequences, grown.tokens, grown.finished, strict=True
        ):
            sequence.done += sequence.fed
            sequence.fed = 0
            sequence.finished = finished
            self._register(one.continuation, sequence)
            if token is not None:
                sequence.ids.append(token)
        if all(grown.finished):
            one.leaving = True

    def _register(self, new: Continuation, sequence: SequenceState) -> None:
        known = sequence.done if new.registers_rest else min(sequence.done, sequence.prompt_tokens)
        if not new.registers_prompt:
            return
        for index in range(sequence.registered, known // self._pool.page_tokens):
            self._pool.register(sequence.chain, sequence.ids, index, sequence.pages[index])
            sequence.registered = index + 1

    def _release(self, one: Generation) -> None:
        for sequence in one.sequences:
            self._pool.release(sequence.pages)
            sequence.pages = []

    # ------------------------------------------------------------ the bound

    def _worst(self, new: Continuation) -> int:
        return sum(self._pool.pages_of(len(ids) + new.max_new_tokens) for ids in new.prompts)

    def _all_fit(self, worst: int) -> bool:
        """Whether all can go on to their ends, one more of `worst` pages included."""
        host = self._max_swapped_tokens // self._pool.page_tokens
        device, swappable = self._pool.num_pages, 0
        for pages in (*(one.worst for one in self._started.values()), worst):
            # Once one of them may have to go, the younger ones have to go before it.
            if swappable or pages > device:
                swappable += pages
            else:
                device -= pages
        return swappable <= host and worst <= self._pool.num_pages

    # ------------------------------------------------------------ a forward

    def go_on(self, plan: PassPlan, candidates: Sequence[Generation], sequence: int) -> None:
        """Let generations that are on the device go on in forward `sequence`.

        Those that have sat out the longest come first, and of these the ones that decode: they
        need one row a sequence. Where pages are short, the youngest are swapped out.
        """
        candidates = sorted(candidates, key=lambda one: (one.last_fed, one.prefilling))
        swapped = True
        # Again where all that had been chosen were swapped out themselves.
        while plan.empty and swapped:
            swapped = self._go_on(plan, candidates, sequence)

    def _go_on(self, plan: PassPlan, candidates: Sequence[Generation], sequence: int) -> bool:
        trial = plan.copy()
        chosen: dict[str, tuple[Generation, list[int], list[int]]] = {}
        for one in candidates:
            feeds = self._feeds(trial, one) if one.swapped_pages is None else []
            if not any(feeds) or not trial.has_room(one.ticket, sum(feeds)):
                continue
            trial.add_part(one.ticket, Part(one.ticket.request, [Feed(count) for count in feeds]))
            chosen[one.ticket.request] = one, feeds, self._pages_for(one, feeds)
        swapped = False
        while sum(sum(wanted) for _, _, wanted in chosen.values()) > self._pool.free:
            youngest = list(self._here())[-1]
            chosen.pop(youngest.ticket.request, None)
            self._swap_out(plan, youngest)
            swapped = True
        for one, feeds, wanted in chosen.values():
            plan.add_part(one.ticket, self._feed(one, feeds, wanted, sequence))
        return swapped

    def bring_back(self, plan: PassPlan, sequence: int, *, shared: bool) -> None:
        """Swap in whoever fits, the oldest first; if `shared`, let them go on at once."""
        if any(isinstance(command, SwapOut) for command in plan.before):
            return
        for one in self._swapped():
            assert one.swapped_pages is not None
            feeds = self._feeds(plan, one)
            fed = shared and not one.ticket.alone and plan.has_room(one.ticket, sum(feeds))
            wanted = self._pages_for(one, feeds)
            if one.num_pages + sum(wanted) + self._growth_of_others() > self._pool.free:
                return
            pages = [self._pool.take(count) for count in one.swapped_pages]
            for each, own in zip(one.sequences, pages, strict=True):
                each.pages = own
            one.swapped_pages = None
            plan.before.append(SwapIn(one.ticket.request, [list(own) for own in pages]))
            if fed and any(feeds):
                plan.add_part(one.ticket, self._feed(one, feeds, wanted, sequence))

    def _swap_out(self, plan: PassPlan, one: Generation) -> None:
        one.swapped_pages = [len(sequence.pages) for sequence in one.sequences]
        self._release(one)
        plan.before.append(SwapOut(one.ticket.request))

    def _growth_of_others(self) -> int:
        """Return pages to be left, so that nobody is swapped out again a forward later."""
        return sum(len(one.sequences) for one in self._here())

    def _feeds(self, plan: PassPlan, one: Generation) -> list[int]:
        """Return how many tokens of each sequence are fed next."""
        if one.continuation.chunkable and one.prefilling:
            return [max(1, min(one.sequences[0].pending, plan.tokens_left))]
        lockstep = one.continuation.lockstep
        return [0 if s.finished and not lockstep else s.pending for s in one.sequences]

    def _pages_for(self, one: Generation, feeds: Sequence[int]) -> list[int]:
        """Return how many pages each sequence needs beyond those it has, or had, to be fed."""
        had = one.swapped_pages or [len(sequence.pages) for sequence in one.sequences]
        return [
            max(0, self._pool.pages_of(sequence.done + count) - pages)
            for sequence, count, pages in zip(one.sequences, feeds, had, strict=True)
        ]

    def _feed(
        self, one: Generation, feeds: Sequence[int], wanted: Sequence[int], sequence: int
    ) -> Part:
        one.last_fed = sequence
        parts = []
        for each, count, pages in zip(one.sequences, feeds, wanted, strict=True):
            new = self._pool.take(pages)
            each.pages = each.pages + new
            each.fed = count
            pad = one.continuation.pad if count and each.finished else None
            if pad is not None:
                each.ids[-1] = pad
            parts.append(Feed(count, new, pad))
        return Part(one.ticket.request, parts)


def first_tokens(ticket: Ticket) -> int:
    """Return the fewest rows with which a request can join a forward."""
    chunkable = ticket.continuation is not None and ticket.continuation.chunkable
    return 1 if chunkable else ticket.tokens
