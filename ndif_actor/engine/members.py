"""The requests in a pass: traces, which come and go with it, and generations, which stay.

A member says which tokens it feeds, how deep into the model they are needed, and whose rows its
program sees.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch

from ndif_actor.engine.batch import Feeding, PackedRows, Packing, Rows
from ndif_actor.engine.cache import KVCache
from ndif_actor.engine.depth import Strand
from ndif_actor.engine.execution import Execution
from ndif_actor.engine.program import Reach
from ndif_actor.engine.sampling import Sampler
from ndif_actor.messages import Group, Part
from ndif_client.wire.graph import Slice


class Trace:
    """A request of one pass."""

    def __init__(self, group: Group, execution: Execution) -> None:
        self.request = group.request
        self.graph = group.graph
        self.execution = execution
        self._group = group

    def feedings(self) -> list[Feeding]:
        """Return the tokens of each prompt, the prompts of all invokes in a row."""
        return whole_prompts(self._group, self.execution.plan.reach)

    def rows(self, packing: Packing, first: int) -> list[Rows]:
        """Return the rows of each invoke; the member's strands begin with number `first`."""
        rows: list[Rows] = []
        for prompts in self._group.invokes:
            lengths = [len(ids) for ids in prompts]
            rows.append(PackedRows(packing, range(first, first + len(prompts)), lengths))
            first += len(prompts)
        return rows


def whole_prompts(group: Group, reaches: Sequence[Reach]) -> list[Feeding]:
    """Return the tokens of each prompt of a group, the prompts of all invokes in a row."""
    feedings = []
    for prompts, reach in zip(group.invokes, reaches, strict=True):
        needs = tail_positions(reach, [len(ids) for ids in prompts])
        for ids, tail in zip(prompts, needs, strict=True):
            strand = Strand(
                length=len(ids),
                last=reach.last,
                fork=reach.first_write,
                family=family(group.sharing, ids),
                tail=tail,
            )
            feedings.append(Feeding(ids, strand))
    return feedings


class Continuation:
    """One sequence of a generation: its tokens, and how many of them are in the KV cache."""

    def __init__(self, ids: list[int], pages: list[int], done: int, sampler: Sampler) -> None:
        self.ids = ids
        self.pages = pages
        self.done = done
        self.sampler = sampler


class Generation:
    """A request that goes on, pass after pass.

    Args:
        group: how it joined.
        execution: of its program.
        page_tokens: tokens of a page of the KV cache.
        tail: the number of the region after the last layer.
        device: of the model.
    """

    def __init__(
        self, group: Group, execution: Execution, page_tokens: int, tail: int, device: torch.device
    ) -> None:
        assert group.decoding is not None
        self.request = group.request
        self.graph = group.graph
        self.execution = execution
        #: whether the next pass begins a step
        self.begins = True
        self._group = group
        self._tail = tail
        prompts = [ids for invoke in group.invokes for ids in invoke]
        cached = group.cached or [[] for _ in prompts]
        self.sequences = [
            Continuation(
                list(ids),
                list(pages),
                len(pages) * page_tokens,
                Sampler(group.decoding, number, len(ids), device),
            )
            for number, (ids, pages) in enumerate(zip(prompts, cached, strict=True))
        ]
        #: of the pass that runs now: the tokens fed to each sequence
        self._fed: list[list[int]] = []
        self._copies: list[list[torch.Tensor]] | None = None

    # ------------------------------------------------------------ a pass

    def feed(self, part: Part, cache: KVCache) -> None:
        """Take in what the coordinator says about the next pass."""
        self._fed = []
        for sequence, feed in zip(self.sequences, part.feeds, strict=True):
            cache.clear(feed.pages)
            sequence.pages += feed.pages
            if feed.token is not None:
                sequence.ids[-1] = feed.token
            self._fed.append(sequence.ids[sequence.done : sequence.done + feed.count])

    @property
    def samples(self) -> bool:
        """Whether this pass makes a step, because a sequence is fed its last known token."""
        return any(self.sampling(number) for number in range(len(self.sequences)))

    def sampling(self, number: int) -> bool:
        """Whether this pass makes a token for one sequence."""
        sequence, fed = self.sequences[number], self._fed[number]
        return bool(fed) and sequence.done + len(fed) == len(sequence.ids)

    def feedings(self) -> list[Feeding]:
        """Return the tokens of each sequence that is fed any."""
        feedings = []
        samples, number = self.samples, 0
        for prompts, reach in zip(self._group.invokes, self.execution.plan.reach, strict=True):
            numbers = range(number, number + len(prompts))
            number += len(prompts)
            needs = tail_positions(reach, [len(self._fed[n]) for n in numbers])
            for n, need in zip(numbers, needs, strict=True):
                if self._fed[n]:
                    feedings.append(self._feeding(n, reach, need, samples=samples))
        return feedings

    def _feeding(
        self, number: int, reach: Reach, need: tuple[int, ...] | None, *, samples: bool
    ) -> Feeding:
        sequence, fed = self.sequences[number], self._fed[number]
        tail = need if need is None else tuple(sorted({*need, len(fed) - 1}))
        whole = sequence.done == 0 and len(fed) == len(sequence.ids)
        strand = Strand(
            length=len(fed),
            past=sequence.done,
            # Without a token to be made, only the cache needs the layers.
            last=self._tail if samples else max(self._tail - 1, 0),
            fork=reach.first_write,
            family=family(self._group.sharing, fed) if whole else None,
            tail=tail,
        )
        return Feeding(fed, strand, sequence.pages)

    def rows(self, packing: Packing, first: int) -> list[Rows]:
        """Return the rows of each invoke; the member's strands begin with number `first`.

        Where a sequence sits out, no node looks at the rows of its invoke.
        """
        rows: list[Rows] = []
        each = iter(zip(self.sequences, self._fed, strict=True))
        for prompts in self._group.invokes:
            own = [(one.done, len(fed)) for one, fed in (next(each) for _ in prompts) if fed]
            lengths = [count for _, count in own]
            totals = [done + count for done, count in own]
            rows.append(PackedRows(packing, range(first, first + len(own)), lengths, totals))
            first += len(own)
        return rows

    def last_rows(self, packing: Packing, first: int) -> list[tuple[int, int]]:
        """Return, for each sequence that gets a token, its number and the row of its logits."""
        found, strand = [], first
        for number, fed in enumerate(self._fed):
            if not fed:
                continue
            if self.sampling(number):
                block = packing.block(strand, packing.current)
                last = len(fed) - 1
                place = last if block.positions is None else block.positions.index(last)
                found.append((number, block.start + place))
            strand += 1
        return found

    def advance(self, tokens: dict[int, int]) -> list[int | None]:
        """Note that the pass is over, and the tokens it has made; return them by sequence."""
        made: list[int | None] = []
        for number, (sequence, fed) in enumerate(zip(self.sequences, self._fed, strict=True)):
            sequence.done += len(fed)
            token = tokens.get(number)
            made.append(token)
            if token is not None:
                sequence.ids.append(token)
        if tokens:
            self.execution.next_step()
        self.begins = bool(tokens)
        return made

    # ------------------------------------------------------------ between passes

    def swap_out(self, cache: KVCache) -> None:
        """Move the KV cache of all sequences to the host's memory."""
        self._copies = [cache.take_out(sequence.pages) for sequence in self.sequences]

    def swap_in(self, cache: KVCache, pages: Sequence[list[int]]) -> None:
        """Move it back, into other pages."""
        assert self._copies is not None, "only what was swapped out comes back"
        for sequence, own, copies in zip(self.sequences, pages, self._copies, strict=True):
            cache.put_back(own, copies)
            sequence.pages = list(own)
        self._copies = None


def family(sharing: int, ids: Sequence[int]) -> Hashable:
    """Return what is equal for sequences whose rows may be computed together."""
    return sharing, tuple(ids)


def tail_positions(reach: Reach, lengths: Sequence[int]) -> list[tuple[int, ...] | None]:
    """Return, for each prompt of an invoke, the positions of it that the tail needs; None for all.

    Indices count in the left-padded whole, as the user sees it.
    """
    if reach.tail is None:
        return [None] * len(lengths)
    longest = max(lengths)
    wanted = {place for index in reach.tail for place in _places(index, longest)}
    padding = [longest - length for length in lengths]
    return [tuple(sorted(p - pad for p in wanted if p >= pad)) for pad in padding]


def _places(index: int | Slice, length: int) -> Iterable[int]:
    if isinstance(index, Slice):
        return range(length)[slice(index.start, index.stop, index.step)]
    return [range(length)[index]] if -length <= index < length else []
