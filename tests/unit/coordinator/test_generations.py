"""Generations in the scheduler: examples, and a random walk against a replica of numbers alone."""

from __future__ import annotations

from collections import Counter

import msgspec
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ndif_actor.coordinator.events import (
    Abandon,
    Accept,
    Admitted,
    Announce,
    Arrived,
    Budget,
    Cancelled,
    Command,
    Continuation,
    Drop,
    Grown,
    Lane,
    PassFinished,
    QueueLimits,
    ReplicaLost,
    ReplicaReady,
    StartPass,
    Ticket,
)
from ndif_actor.coordinator.scheduler import Scheduler
from ndif_actor.messages import Feed, Forget, SwapIn, SwapOut

PAGE = 4


def ready(tokens: int = 100, *, num_pages: int = 100, swapped: int = 0) -> Scheduler:
    scheduler = Scheduler(Budget(tokens), QueueLimits(), swapped)
    assert scheduler.handle(ReplicaReady(True, num_pages, PAGE)) == []
    return scheduler


def generation(
    name: str,
    *prompts: list[int],
    new: int = 8,
    chunkable: bool = False,
    alone: bool = False,
    sharing: int = 0,
    lockstep: bool = False,
) -> Ticket:
    continuation = Continuation(
        prompts=list(prompts),
        max_new_tokens=new,
        sharing=sharing,
        chunkable=chunkable,
        takes_cached=chunkable and not alone,
        registers_prompt=True,
        registers_rest=True,
        lockstep=lockstep,
        pad=0,
    )
    lane: Lane = "alone" if alone else "shared"
    return Ticket(name, sum(map(len, prompts)), lane=lane, continuation=continuation)


def submit(scheduler: Scheduler, user: str, *tickets: Ticket) -> StartPass | None:
    names = tuple(ticket.request for ticket in tickets)
    assert scheduler.handle(Arrived(names, user)) == [Accept(names)]
    return started(scheduler.handle(Admitted(tickets)))


def started(commands: list[Command]) -> StartPass | None:
    return next((command for command in commands if isinstance(command, StartPass)), None)


def finish(scheduler: Scheduler, start: StartPass | None, *over: str) -> StartPass | None:
    """End a pass in which everyone who was fed a last token got token 7."""
    return started(commands_after(scheduler, start, *over))


def commands_after(scheduler: Scheduler, start: StartPass | None, *over: str) -> list[Command]:
    assert start is not None
    grown = []
    for part in start.parts:
        if part.request not in over:
            tokens = tuple(7 if feed.count else None for feed in part.feeds)
            grown.append(Grown(part.request, tokens, (False,) * len(tokens)))
    return scheduler.handle(PassFinished(start.sequence, tuple(grown), over))


def feeds(start: StartPass | None, request: str) -> list[Feed]:
    assert start is not None
    return next(part.feeds for part in start.parts if part.request == request)


def test_a_generation_goes_on_in_every_forward_and_is_forgotten_at_its_end() -> None:
    scheduler = ready()

    first = submit(scheduler, "ann", generation("g", [1] * 6))
    assert first is not None
    assert first.requests == ("g",)
    assert [(feed.count, len(feed.pages)) for feed in feeds(first, "g")] == [(6, 2)]
    second = finish(scheduler, first)
    assert second is not None
    assert second.requests == ()
    assert feeds(second, "g") == [Feed(1, [])]
    third = finish(scheduler, second)
    assert len(feeds(third, "g")[0].pages) == 0
    fourth = finish(scheduler, third)
    assert len(feeds(fourth, "g")[0].pages) == 1

    assert commands_after(scheduler, fourth, "g") == [Forget(["g"])]
    assert scheduler.statistics().free_pages == 100


def test_traces_join_while_a_generation_goes_on() -> None:
    scheduler = ready()
    first = submit(scheduler, "ann", generation("g", [1] * 6))
    submit(scheduler, "bob", Ticket("t", 5))

    second = finish(scheduler, first)

    assert second is not None
    assert second.requests == ("t",)
    assert second.members == ("t", "g")


def test_a_long_prompt_is_fed_in_pieces_beside_those_that_decode() -> None:
    scheduler = ready(10)
    first = submit(scheduler, "ann", generation("g", [1] * 3))
    submit(scheduler, "bob", generation("long", [1] * 25, chunkable=True))

    second = finish(scheduler, first)
    assert [feed.count for feed in feeds(second, "long")] == [9]
    assert second is not None
    grown = (Grown("g", (7,), (False,)), Grown("long", (None,), (False,)))
    third = started(scheduler.handle(PassFinished(second.sequence, grown)))

    assert [feed.count for feed in feeds(third, "g")] == [1]
    assert [feed.count for feed in feeds(third, "long")] == [9]


def test_a_prompt_that_is_known_is_not_fed_again_by_the_same_user() -> None:
    scheduler = ready()
    prompt = list(range(10))
    first = submit(scheduler, "ann", generation("first", prompt, chunkable=True))
    finish(scheduler, finish(scheduler, first), "first")

    again = submit(scheduler, "ann", generation("again", prompt, chunkable=True))
    assert again is not None
    assert len(again.cached["again"][0]) == 2
    assert feeds(again, "again")[0].count == 2
    submit(scheduler, "bob", generation("other", prompt, chunkable=True, sharing=1))
    other = finish(scheduler, again, "again")

    assert other is not None
    assert other.cached["other"] == [[]]


def test_a_chat_goes_on_from_what_was_generated() -> None:
    scheduler = ready()
    start = submit(scheduler, "ann", generation("g", [1] * 4, chunkable=True))
    for _ in range(5):
        start = finish(scheduler, start)
    finish(scheduler, start, "g")

    again = submit(scheduler, "ann", generation("next", [1] * 4 + [7] * 5, chunkable=True))

    assert again is not None
    assert len(again.cached["next"][0]) == 2


def test_who_waits_for_numbers_of_its_own_takes_turns_with_the_others() -> None:
    scheduler = ready()
    start = submit(scheduler, "ann", generation("shared", [1] * 3))
    submit(scheduler, "bob", generation("solo", [1] * 3, alone=True))
    submit(scheduler, "cat", Ticket("trace", 3, lane="alone"))

    seen = []
    for _ in range(6):
        start = finish(scheduler, start)
        assert start is not None
        seen.append((start.members, start.alone))

    assert seen == [
        (("solo",), True),
        (("shared",), False),
        (("solo",), True),
        (("shared",), False),
        (("trace",), True),
        (("shared",), False),
    ]


def test_where_pages_are_short_the_youngest_makes_room_and_comes_back() -> None:
    scheduler = ready(num_pages=4, swapped=100)
    start = submit(scheduler, "ann", generation("old", [1] * 7, new=9))
    submit(scheduler, "bob", generation("young", [1] * 3, new=9))
    start = finish(scheduler, start)
    assert start is not None
    assert start.members == ("young", "old")
    moved: list[object] = []
    while not moved:
        start = finish(scheduler, start)
        assert start is not None
        moved += start.before
    assert moved == [SwapOut("young")]
    assert start.members == ("old",)

    last = finish(scheduler, start, "old")

    assert last is not None
    assert [type(command) for command in last.before] == [Forget, SwapIn]
    assert last.members == ("young",)


def test_a_cancelled_generation_leaves_after_its_forward() -> None:
    scheduler = ready()
    start = submit(scheduler, "ann", generation("g", [1] * 6))

    assert scheduler.handle(Cancelled("g")) == [Drop("g")]
    assert start is not None
    assert scheduler.handle(PassFinished(start.sequence)) == [Forget(["g"])]
    assert scheduler.statistics().free_pages == 100


def test_a_lost_replica_abandons_generations_and_comes_back_empty() -> None:
    scheduler = ready()
    start = submit(scheduler, "ann", generation("g", list(range(10)), chunkable=True))
    finish(scheduler, start)

    assert scheduler.handle(ReplicaLost()) == [Abandon(("g",))]
    assert scheduler.handle(ReplicaReady(True, 50, PAGE)) == []
    assert scheduler.statistics().free_pages == 50
    again = submit(scheduler, "ann", generation("h", list(range(10)), chunkable=True))
    assert again is not None
    assert again.cached["h"] == [[]]


def test_a_generation_the_new_replica_has_no_room_for_is_given_up() -> None:
    scheduler = ready(num_pages=10)
    submit(scheduler, "ann", Ticket("running", 100))
    submit(scheduler, "ann", generation("g", [1] * 30))
    scheduler.handle(ReplicaLost())

    assert scheduler.handle(ReplicaReady(True, 3, PAGE)) == [Abandon(("g",))]


def test_generations_do_not_keep_a_large_request_out_for_ever() -> None:
    scheduler = ready(10)
    start = submit(scheduler, "ann", generation("g", [1] * 3, new=100))
    assert submit(scheduler, "bob", Ticket("large", 100)) is None

    members = []
    for _ in range(3):
        start = finish(scheduler, start)
        assert start is not None
        members.append(start.members)

    assert members == [("g",), ("large",), ("g",)]


def test_sequences_that_have_ended_are_fed_the_pad_where_others_are_looked_at() -> None:
    scheduler = ready()
    start = submit(scheduler, "ann", generation("g", [1] * 3, [1] * 2, lockstep=True))
    assert start is not None
    grown = Grown("g", (7, 7), (False, True))

    second = started(scheduler.handle(PassFinished(start.sequence, (grown,))))

    assert [(feed.count, feed.token) for feed in feeds(second, "g")] == [(1, None), (1, 0)]


class _Known(msgspec.Struct):
    """A sequence as a shard knows it."""

    ids: list[int]
    done: int
    pages: list[int]


class Walk(RuleBasedStateMachine):
    """Any order of arrivals, cancels, ends and losses keeps every promise about pages and steps."""

    BUDGET, NUM_PAGES, HOST_PAGES = 12, 10, 6

    @initialize()
    def begin(self) -> None:
        self.scheduler = Scheduler(Budget(self.BUDGET), QueueLimits(), self.HOST_PAGES * PAGE)
        self.count = 0
        self.tickets: dict[str, Ticket] = {}
        self.user_of: dict[str, str] = {}
        self.start: StartPass | None = None
        self.ready = False
        self.ended: Counter[str] = Counter()
        #: generations on the shards, those in the host's memory, and what lies in each page
        self.device: dict[str, list[_Known]] = {}
        self.host: dict[str, list[_Known]] = {}
        self.content: dict[int, list[int]] = {}
        self.finished: dict[str, list[bool]] = {}
        self.become_ready()

    # ------------------------------------------------------------ the virtual shards

    def obey(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case StartPass():
                    self.run(command)
                case Forget():
                    self.tell(command)
                case Abandon(requests=requests):
                    self.ended.update(requests)
                case Drop(request=request):
                    self.ended[request] += 1
                case Announce():
                    pass
                case _:
                    raise AssertionError(command)

    def tell(self, command: Forget | SwapOut | SwapIn) -> None:
        match command:
            case Forget(requests=requests):
                for request in requests:
                    assert request in self.device or request in self.host
                    self.device.pop(request, None)
                    self.host.pop(request, None)
            case SwapOut(request=request):
                self.host[request] = self.device.pop(request)
                event("swapped out")
            case SwapIn(request=request, pages=pages):
                known = self.host.pop(request)
                event("swapped in")
                for sequence, own in zip(known, pages, strict=True):
                    assert len(own) == len(sequence.pages)
                    self.take_over(own)
                    sequence.pages = list(own)
                    self.write(sequence, 0)
                self.device[request] = known

    def take_over(self, pages: list[int]) -> None:
        used = {p for known in self.device.values() for s in known for p in s.pages}
        assert not used & set(pages), "a page that others use is handed out"
        assert all(0 <= page < self.NUM_PAGES for page in pages)
        for page in pages:
            self.content.pop(page, None)

    def write(self, sequence: _Known, start: int) -> None:
        for index in range(start // PAGE, -(-sequence.done // PAGE)):
            self.content[sequence.pages[index]] = sequence.ids[
                : min((index + 1) * PAGE, sequence.done)
            ]

    def run(self, start: StartPass) -> None:
        assert self.ready and self.start is None
        for command in start.before:
            self.tell(command)
        self.start = start
        assert len(start.members) >= 1
        assert not start.alone or len(start.members) == 1
        assert len({self.tickets[request].lane for request in start.members}) == 1
        for request in start.requests:
            ticket = self.tickets[request]
            assert ticket.alone == start.alone
            if ticket.continuation is not None:
                self.join(request, ticket.continuation, start.cached[request])
        rows = sum(self.tickets[r].tokens for r in start.requests if r not in self.device)
        for part in start.parts:
            rows += self.feed(part.request, part.feeds)
        assert rows <= self.BUDGET or len(start.members) == 1
        pages = sum(len(s.pages) for known in self.host.values() for s in known)
        assert pages <= self.HOST_PAGES

    def join(self, request: str, new: Continuation, cached: list[list[int]]) -> None:
        self.device[request] = []
        for ids, pages in zip(new.prompts, cached, strict=True):
            done = len(pages) * PAGE
            assert done < len(ids)
            for index, page in enumerate(pages):
                assert self.content[page] == ids[: (index + 1) * PAGE]
                event("found in the cache")
            self.device[request].append(_Known(list(ids), done, list(pages)))
        self.finished[request] = [False] * len(new.prompts)

    def feed(self, request: str, feeds: list[Feed]) -> int:
        new = self.tickets[request].continuation
        assert new is not None
        rows = 0
        for number, (sequence, feed) in enumerate(zip(self.device[request], feeds, strict=True)):
            self.take_over(feed.pages)
            sequence.pages = sequence.pages + feed.pages
            if self.finished[request][number]:
                assert feed.count == int(new.lockstep) and (feed.token == 0 or not feed.count)
            if feed.token is not None:
                sequence.ids[-1] = feed.token
            pending = len(sequence.ids) - sequence.done
            if new.chunkable and sequence.done < len(new.prompts[0]):
                assert 1 <= feed.count <= pending
            elif not self.finished[request][number]:
                assert feed.count == pending
            before, sequence.done = sequence.done, sequence.done + feed.count
            assert sequence.done <= len(sequence.pages) * PAGE
            self.write(sequence, before)
            rows += feed.count
        assert rows
        return rows

    # ------------------------------------------------------------ what happens

    @rule(data=st.data(), user=st.sampled_from("AB"), count=st.integers(1, 3))
    def arrive(self, data: st.DataObject, user: str, count: int) -> None:
        tickets = []
        for _ in range(count):
            self.count += 1
            name = f"r{self.count}"
            alone = data.draw(st.integers(0, 4)) == 0
            kind = data.draw(st.sampled_from(["trace", "one", "several"]))
            length = st.integers(1, 14)
            if kind == "trace":
                lanes: list[Lane] = ["alone"] if alone else ["shared", "gradient"]
                lane = data.draw(st.sampled_from(lanes))
                ticket = Ticket(name, data.draw(length), lane=lane)
            else:
                prompts = [
                    [1] * data.draw(length if kind == "one" else st.integers(1, 5))
                    for _ in range(1 if kind == "one" else 2)
                ]
                ticket = generation(
                    name,
                    *prompts,
                    new=data.draw(st.integers(1, 14)),
                    chunkable=kind == "one" and data.draw(st.booleans()),
                    alone=alone,
                    sharing=ord(user),
                    lockstep=kind == "several" and data.draw(st.booleans()),
                )
            self.tickets[name], self.user_of[name] = ticket, user
            tickets.append(ticket)
        names = tuple(ticket.request for ticket in tickets)
        assert self.scheduler.handle(Arrived(names, user)) == [Accept(names)]
        self.obey(self.scheduler.handle(Admitted(tuple(tickets))))

    @precondition(lambda self: self.start is not None)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.finish_with(lambda request: data.draw(st.integers(0, 6), label=f"end {request}") == 0)

    def finish_with(self, ends: object) -> None:
        assert callable(ends) and self.start is not None
        start, self.start = self.start, None
        grown, over = [], []
        for request in start.members:
            if request not in self.device:
                if not self.ended[request]:
                    self.ended[request] += 1
                continue
            new = self.tickets[request].continuation
            assert new is not None
            known, finished = self.device[request], self.finished[request]
            part = next(part for part in start.parts if part.request == request)
            tokens: list[int | None] = []
            for number, (sequence, feed) in enumerate(zip(known, part.feeds, strict=True)):
                tokens.append(None)
                if feed.count and sequence.done == len(sequence.ids):
                    tokens[-1] = 7
                    sequence.ids.append(7)
                    made = len(sequence.ids) - len(new.prompts[number])
                    finished[number] |= made >= new.max_new_tokens or ends(request)
            if self.ended[request]:
                continue
            if all(finished):
                over.append(request)
                self.ended[request] += 1
            else:
                grown.append(Grown(request, tuple(tokens), tuple(finished)))
        self.obey(self.scheduler.handle(PassFinished(start.sequence, tuple(grown), tuple(over))))

    @precondition(lambda self: self.count)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = f"r{data.draw(st.integers(1, self.count))}"
        alive = not self.ended[name]
        commands = self.scheduler.handle(Cancelled(name))
        assert commands[:1] == ([Drop(name)] if alive else [])
        self.obey(commands)

    @precondition(lambda self: not self.ready)
    @rule()
    def become_ready(self) -> None:
        self.ready = True
        self.obey(self.scheduler.handle(ReplicaReady(True, self.NUM_PAGES, PAGE)))

    @precondition(lambda self: self.ready and self.count > 4)
    @rule(really=st.integers(0, 3))
    def lose(self, really: int) -> None:
        if really:
            return
        self.ready = False
        commands = self.scheduler.handle(ReplicaLost())
        self.device, self.host, self.content, self.start = {}, {}, {}, None
        self.obey(commands)

    # ------------------------------------------------------------ promises

    @invariant()
    def nothing_ends_twice(self) -> None:
        assert all(count <= 1 for count in self.ended.values())

    @invariant()
    def something_runs_while_something_waits(self) -> None:
        open_ = self.count - sum(self.ended.values())
        assert self.start is not None or not self.ready or not open_

    @invariant()
    def no_page_leaks(self) -> None:
        if self.ready:
            used = {p for known in self.device.values() for s in known for p in s.pages}
            assert self.scheduler.statistics().free_pages == self.NUM_PAGES - len(used)

    def teardown(self) -> None:
        """Everything ends when nothing more arrives."""
        if not self.ready:
            self.become_ready()
        for _ in range(10_000):
            if self.start is None:
                break
            self.finish_with(lambda request: False)
        assert sum(self.ended.values()) == self.count
        assert not self.device and not self.host
        assert self.scheduler.statistics().free_pages == self.NUM_PAGES
        assert self.scheduler.statistics().running == self.scheduler.statistics().queued == 0


TestWalk = Walk.TestCase
TestWalk.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
