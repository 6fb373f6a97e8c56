"""The scheduler's promises, example by example and as a random walk."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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
from ndif_actor.coordinator.scheduler import Scheduler


def ready(
    tokens: int = 100, *, packed: bool = True, limits: QueueLimits | None = None
) -> Scheduler:
    scheduler = Scheduler(Budget(tokens), limits or QueueLimits())
    assert scheduler.handle(ReplicaReady(packed)) == []
    return scheduler


def submit(scheduler: Scheduler, user: str, *tickets: Ticket) -> list[Command]:
    names = tuple(ticket.request for ticket in tickets)
    assert scheduler.handle(Arrived(names, user)) == [Accept(names)]
    return scheduler.handle(Admitted(tickets))


def started(commands: list[Command]) -> list[tuple[str, ...]]:
    return [command.requests for command in commands if isinstance(command, StartPass)]


def test_a_request_starts_at_once_when_nothing_runs() -> None:
    commands = submit(ready(), "ann", Ticket("a", 7))

    assert commands == [Announce("a", 0), StartPass(1, ("a",), "packed")]


def test_whatever_waits_when_a_forward_ends_shares_the_next_one() -> None:
    scheduler = ready()
    submit(scheduler, "ann", Ticket("first", 7))
    for user in ("ann", "bob", "cat"):
        assert started(submit(scheduler, user, Ticket(f"next-{user}", 7))) == []

    assert started(scheduler.handle(PassFinished(1))) == [("next-ann", "next-bob", "next-cat")]


def test_requests_of_one_submission_start_together() -> None:
    tickets = [Ticket(f"r{i}", 10) for i in range(10)]

    assert started(submit(ready(100), "ann", *tickets)) == [tuple(t.request for t in tickets)]


def test_a_user_with_many_requests_does_not_delay_another() -> None:
    scheduler = ready(20)
    submit(scheduler, "greedy", *(Ticket(f"g{i}", 10) for i in range(50)))
    submit(scheduler, "ann", Ticket("a", 10))

    assert started(scheduler.handle(PassFinished(1))) == [("g2", "a")]


def test_a_forward_stays_within_its_budgets() -> None:
    budget = Budget(tokens=10, nbytes=100, tensors=4)
    for ticket in (Ticket("x", 6), Ticket("x", 1, 60), Ticket("x", 1, 0, 3)):
        scheduler = Scheduler(budget, QueueLimits())
        scheduler.handle(ReplicaReady(True))
        pair = [Ticket(name, ticket.tokens, ticket.nbytes, ticket.tensors) for name in "ab"]

        assert started(submit(scheduler, "ann", *pair)) == [("a",)]


def test_requests_with_gradients_share_forwards_of_their_own() -> None:
    scheduler = ready()
    submit(scheduler, "ann", Ticket("running", 7))
    submit(scheduler, "ann", Ticket("a", 7, lane="gradient"), Ticket("b", 7))
    submit(scheduler, "bob", Ticket("c", 7, lane="gradient"))
    submit(scheduler, "cat", Ticket("d", 7))

    assert started(scheduler.handle(PassFinished(1))) == [("a", "c")]
    assert [set(names) for names in started(scheduler.handle(PassFinished(2)))] == [{"b", "d"}]


def test_a_request_larger_than_the_budget_runs_alone() -> None:
    scheduler = ready(10)
    first = submit(scheduler, "ann", Ticket("small", 2))
    submit(scheduler, "bob", Ticket("huge", 1000))
    submit(scheduler, "cat", Ticket("other", 2))

    assert started(first) == [("small",)]
    assert started(scheduler.handle(PassFinished(1))) == [("huge",)]
    assert started(scheduler.handle(PassFinished(2))) == [("other",)]


def test_a_large_request_is_not_overtaken_for_ever_by_small_ones() -> None:
    scheduler = ready(10)
    submit(scheduler, "ann", Ticket("a0", 8))
    submit(scheduler, "small", *(Ticket(f"s{i}", 3) for i in range(100)))
    submit(scheduler, "large", Ticket("large", 9))

    assert started(scheduler.handle(PassFinished(1))) == [("s0", "s1", "s2")]
    assert started(scheduler.handle(PassFinished(2))) == [("large",)]


def test_a_model_that_cannot_be_packed_runs_one_request_a_forward() -> None:
    scheduler = ready(packed=False)

    commands = submit(scheduler, "ann", Ticket("a", 1), Ticket("b", 1))

    assert StartPass(1, ("a",), "dense") in commands
    assert started(scheduler.handle(PassFinished(1))) == [("b",)]


def test_an_idle_replica_lingers_for_requests_that_are_being_admitted() -> None:
    scheduler = ready()
    scheduler.handle(Arrived(("a",), "ann"))
    scheduler.handle(Arrived(("b",), "bob"))
    scheduler.handle(Arrived(("c",), "cat"))

    assert scheduler.handle(Admitted((Ticket("a", 1),)))[1:] == [Linger(1)]
    assert started(scheduler.handle(Admitted((Ticket("b", 1),)))) == []
    assert started(scheduler.handle(Admitted((), ("c",)))) == [("a", "b")]
    assert scheduler.handle(LingerOver(1)) == []


def test_lingering_ends_in_time() -> None:
    scheduler = ready()
    scheduler.handle(Arrived(("a",), "ann"))
    scheduler.handle(Arrived(("slow",), "bob"))
    scheduler.handle(Admitted((Ticket("a", 1),)))

    assert started(scheduler.handle(LingerOver(1))) == [("a",)]
    assert scheduler.handle(Admitted((Ticket("slow", 1),))) == [Announce("slow", 0)]
    assert started(scheduler.handle(PassFinished(1))) == [("slow",)]


def test_a_forward_that_ends_is_followed_at_once() -> None:
    scheduler = ready()
    submit(scheduler, "ann", Ticket("a", 1))
    submit(scheduler, "ann", Ticket("b", 1))
    scheduler.handle(Arrived(("c",), "cat"))

    assert started(scheduler.handle(PassFinished(1))) == [("b",)]


def test_cancelling_the_one_that_is_waited_for_ends_the_lingering() -> None:
    scheduler = ready()
    scheduler.handle(Arrived(("a",), "ann"))
    scheduler.handle(Arrived(("slow",), "bob"))
    scheduler.handle(Admitted((Ticket("a", 1),)))

    assert started(scheduler.handle(Cancelled("slow"))) == [("a",)]


def test_a_new_replica_lingers_anew() -> None:
    scheduler = ready()
    for name in ("a", "b", "slow"):
        scheduler.handle(Arrived((name,), name))
    assert Linger(1) in scheduler.handle(Admitted((Ticket("a", 1),)))
    scheduler.handle(ReplicaLost())
    scheduler.handle(Cancelled("a"))
    scheduler.handle(ReplicaReady(True))

    assert Linger(1) in scheduler.handle(Admitted((Ticket("b", 1),)))


def test_positions_count_who_starts_first_and_shrink() -> None:
    scheduler = ready(10)
    submit(scheduler, "ann", Ticket("a0", 10))
    first = submit(scheduler, "ann", Ticket("a1", 10), Ticket("a2", 10))
    second = submit(scheduler, "bob", Ticket("b1", 10))

    assert first == [Announce("a1", 0), Announce("a2", 1)]
    assert second == [Announce("b1", 1)]
    assert scheduler.handle(PassFinished(1)) == [
        StartPass(2, ("a1",), "packed"),
        Announce("b1", 0),
    ]


def test_a_cancelled_request_never_starts_in_any_state() -> None:
    scheduler = ready(10)
    submit(scheduler, "ann", Ticket("running", 10))
    submit(scheduler, "ann", Ticket("queued", 10))
    scheduler.handle(Arrived(("admitting",), "ann"))

    for name in ("running", "queued", "admitting"):
        assert scheduler.handle(Cancelled(name)) == [Drop(name)]
    assert scheduler.handle(Admitted((Ticket("admitting", 1),))) == []
    assert scheduler.handle(PassFinished(1)) == []
    assert scheduler.handle(Cancelled("queued")) == []
    assert scheduler.statistics().queued == scheduler.statistics().admitting == 0


def test_a_lost_replica_abandons_its_forward_and_keeps_the_queue() -> None:
    scheduler = ready(10)
    submit(scheduler, "ann", Ticket("running", 10))
    submit(scheduler, "ann", Ticket("queued", 10))

    assert scheduler.handle(ReplicaLost()) == [Abandon(("running",))]
    assert scheduler.handle(PassFinished(1)) == []
    assert started(scheduler.handle(ReplicaReady(True))) == [("queued",)]


def test_an_id_in_use_is_rejected_without_touching_the_first() -> None:
    scheduler = ready()
    submit(scheduler, "ann", Ticket("same", 1))

    (answer,) = scheduler.handle(Arrived(("same",), "bob"))

    assert isinstance(answer, Reject)
    assert answer.reason == "known"


def test_a_full_queue_rejects_whole_submissions_and_says_which_limit() -> None:
    for limits, words in (
        (QueueLimits(max_requests=2), "2 of at most 2 requests"),
        (QueueLimits(max_requests_per_user=2), "2 of at most 2 requests a user"),
        (QueueLimits(max_bytes=10), "10 of at most 10 bytes"),
    ):
        scheduler = ready(limits=limits)
        assert scheduler.handle(Arrived(("a", "b"), "ann", 10)) == [Accept(("a", "b"))]

        (answer,) = scheduler.handle(Arrived(("c",), "ann", 1))

        assert isinstance(answer, Reject)
        assert answer.reason == "busy"
        assert words in answer.message
        assert scheduler.handle(Admitted((), ("a", "b"))) == []
        assert scheduler.handle(Arrived(("c",), "ann", 1)) == [Accept(("c",))]


def chain(*names: str) -> list[Ticket]:
    """Tickets that come one after another."""
    befores = [(), *((name,) for name in names)]
    return [Ticket(name, 1, after=before) for name, before in zip(names, befores, strict=False)]


def test_members_of_a_chain_run_in_forwards_that_follow_each_other_at_once() -> None:
    scheduler = ready()

    assert started(submit(scheduler, "ann", *chain("a", "b", "c"))) == [("a",)]
    assert started(scheduler.handle(PassFinished(1))) == [("b",)]
    assert started(scheduler.handle(PassFinished(2))) == [("c",)]
    assert scheduler.handle(PassFinished(3)) == []
    assert scheduler.statistics().queued == scheduler.statistics().running == 0


def test_a_chain_keeps_its_place_before_what_its_user_sent_later() -> None:
    scheduler = ready(1)
    submit(scheduler, "ann", *chain("a", "b", "c"))
    submit(scheduler, "ann", Ticket("later", 1))

    order = [started(scheduler.handle(PassFinished(number))) for number in (1, 2, 3)]

    assert order == [[("b",)], [("c",)], [("later",)]]


def test_others_share_the_forwards_of_a_chain() -> None:
    scheduler = ready()
    submit(scheduler, "ann", *chain("a", "b"))
    submit(scheduler, "ann", Ticket("free", 1))
    submit(scheduler, "bob", Ticket("other", 1))

    (members,) = started(scheduler.handle(PassFinished(1)))
    assert set(members) == {"b", "free", "other"}


def test_positions_in_a_chain_count_those_before() -> None:
    scheduler = ready(1)
    submit(scheduler, "bob", Ticket("running", 1))

    assert submit(scheduler, "ann", *chain("a", "b", "c")) == [
        Announce("a", 0),
        Announce("b", 1),
        Announce("c", 2),
    ]


def test_whoever_comes_after_one_that_failed_fails_with_its_name() -> None:
    scheduler = ready()
    submit(scheduler, "ann", *chain("a", "b", "c"), Ticket("free", 1))

    commands = scheduler.handle(PassFinished(1, ended=("a", "free"), failed=("a",)))

    assert commands == [AfterFailed(("b", "c"), "a")]
    assert scheduler.statistics().queued == 0


def test_cancelling_one_of_a_chain_ends_those_after_it_alone() -> None:
    scheduler = ready()
    submit(scheduler, "ann", *chain("a", "b", "c"))

    assert scheduler.handle(Cancelled("b")) == [Drop("b"), AfterFailed(("c",), "b")]
    assert scheduler.handle(PassFinished(1)) == []


def test_a_refused_request_takes_those_of_its_submission_along_that_come_after_it() -> None:
    scheduler = ready()
    first, *others = chain("a", "b", "c")
    scheduler.handle(Arrived(("a", "b", "c"), "ann"))

    commands = scheduler.handle(Admitted(tuple(others), (first.request,)))

    assert AfterFailed(("b", "c"), "a") in commands
    assert scheduler.statistics().queued == scheduler.statistics().admitting == 0


def test_a_lost_replica_ends_the_chains_that_were_running() -> None:
    scheduler = ready(1)
    submit(scheduler, "ann", *chain("a", "b"))
    submit(scheduler, "bob", *chain("c", "d"))

    assert scheduler.handle(ReplicaLost()) == [Abandon(("a",)), AfterFailed(("b",), "a")]
    assert started(scheduler.handle(ReplicaReady(True))) == [("c",)]


def test_one_may_come_after_several_and_several_after_one() -> None:
    scheduler = ready(2)
    submit(
        scheduler,
        "ann",
        Ticket("a", 1),
        Ticket("b", 2),
        Ticket("both", 1, after=("a", "b")),
        Ticket("too", 1, after=("a", "b")),
    )

    assert started(scheduler.handle(PassFinished(1))) == [("b",)]
    assert started(scheduler.handle(PassFinished(2))) == [("both", "too")]


class RandomWalk(RuleBasedStateMachine):
    """Any order of arrivals, admissions, cancels, forwards and losses keeps every promise."""

    BUDGET = 20

    @initialize(packed=st.booleans())
    def begin(self, packed: bool) -> None:
        self.scheduler = Scheduler(Budget(self.BUDGET), QueueLimits())
        self.count = 0
        self.packed = packed
        self.ready = False
        self.tokens: dict[str, int] = {}
        self.user_of: dict[str, str] = {}
        self.admitting: list[tuple[str, ...]] = []
        self.queued: dict[str, list[str]] = {}
        self.running: tuple[str, ...] = ()
        self.sequence = 0
        self.lingers = False
        self.ended: Counter[str] = Counter()
        self.after: dict[str, set[str]] = {}
        self.blocked: set[str] = set()
        self.failed: set[str] = set()
        self.waited: dict[str, int] = {}

    def obey(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case StartPass():
                    self.check_pass(command)
                case Linger(sequence=sequence):
                    assert sequence == self.sequence + 1
                    assert not self.lingers and not self.running and self.admitting
                    self.lingers = True
                case Abandon(requests=requests):
                    assert set(requests) <= set(self.running)
                    self.end_badly(*requests)
                case Drop(request=request):
                    self.end_badly(request)
                case AfterFailed(requests=requests, cause=cause):
                    causes = {cause}
                    assert cause in self.failed
                    for request in requests:
                        assert request in self.blocked
                        assert self.after[request] & causes, "only those that come after it"
                        causes.add(request)
                    self.end_badly(*requests)
                case Announce(request=request, position=position):
                    others = sum(map(len, self.queued.values())) + len(self.blocked)
                    assert 0 <= position <= others
                case _:
                    raise AssertionError(command)

    def end_badly(self, *requests: str) -> None:
        self.ended.update(requests)
        self.failed.update(requests)
        self.blocked.difference_update(requests)

    def enqueue(self, name: str) -> None:
        queue = self.queued.setdefault(self.user_of[name], [])
        queue.append(name)
        queue.sort(key=lambda each: int(each[1:]))

    def release(self) -> None:
        """Queue what waited for nobody but requests that have ended well."""
        for name in sorted(self.blocked, key=lambda each: int(each[1:])):
            if all(self.ended[other] and other not in self.failed for other in self.after[name]):
                self.blocked.discard(name)
                self.enqueue(name)

    def check_pass(self, start: StartPass) -> None:
        assert self.ready and not self.running
        assert start.sequence == self.sequence + 1
        assert start.layout == ("packed" if self.packed else "dense")
        assert len(start.requests) == 1 or self.packed
        assert len(start.requests) == 1 or self.total(start.requests) <= self.BUDGET
        backlog = set(self.queued)
        for request in start.requests:
            queue = self.queued[self.user_of[request]]
            assert queue.pop(0) == request, "first in, first out inside a user"
            assert all(self.ended[other] for other in self.after[request])
            assert not self.after[request] & self.failed
        self.queued = {user: queue for user, queue in self.queued.items() if queue}
        self.check_turns(start.requests, backlog)
        self.sequence, self.running, self.lingers = start.sequence, start.requests, False

    def check_turns(self, requests: tuple[str, ...], backlog: set[str]) -> None:
        served = Counter(self.user_of[request] for request in requests)
        for user in backlog:
            self.waited[user] = 0 if served[user] else self.waited.get(user, 0) + 1
            assert self.waited[user] <= 5, "nobody waits longer than there are users"
        left = self.BUDGET - self.total(requests)
        if self.packed:
            for queue in self.queued.values():
                assert self.tokens[queue[0]] > left, "a forward starts as full as turns allow"

    def total(self, requests: tuple[str, ...]) -> int:
        return sum(self.tokens[request] for request in requests)

    @rule(
        user=st.sampled_from("ABCDE"),
        sizes=st.lists(st.integers(1, 25), min_size=1, max_size=8),
        chained=st.booleans(),
        data=st.data(),
    )
    def arrive(self, user: str, sizes: list[int], chained: bool, data: st.DataObject) -> None:
        names = []
        for size in sizes:
            earlier = [f"r{number + 1}" for number in range(self.count)]
            self.count += 1
            names.append(f"r{self.count}")
            self.after[names[-1]] = set()
            if earlier and chained:
                drawn = data.draw(st.lists(st.sampled_from(earlier[-5:]), max_size=2))
                self.after[names[-1]] = set(drawn)
            self.tokens[names[-1]], self.user_of[names[-1]] = size, user
        assert self.scheduler.handle(Arrived(tuple(names), user)) == [Accept(tuple(names))]
        self.admitting.append(tuple(names))

    @precondition(lambda self: self.admitting)
    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        names = self.admitting.pop(0)
        refused = tuple(
            name
            for name in names
            # The coordinator itself refuses what comes after one that has failed before.
            if self.after[name] & self.failed or data.draw(st.integers(0, 3), label=name) == 0
        )
        kept = [name for name in names if name not in refused]
        self.end_badly(*(name for name in refused if not self.ended[name]))
        for name in kept:
            if self.ended[name]:
                continue
            if all(self.ended[other] and other not in refused for other in self.after[name]):
                self.enqueue(name)
            else:
                self.blocked.add(name)
        tickets = tuple(
            Ticket(name, self.tokens[name], after=tuple(sorted(self.after[name]))) for name in kept
        )
        self.obey(self.scheduler.handle(Admitted(tickets, refused)))

    @precondition(lambda self: self.count)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = f"r{data.draw(st.integers(1, self.count))}"
        alive = not self.ended[name]
        user = self.user_of[name]
        if name in self.queued.get(user, ()):
            self.queued[user].remove(name)
            self.queued = {user: queue for user, queue in self.queued.items() if queue}
        commands = self.scheduler.handle(Cancelled(name))
        assert commands[:1] == ([Drop(name)] if alive else [])
        self.obey(commands)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        ended = [name for name in self.running if not self.ended[name]]
        failed = [name for name in ended if data.draw(st.integers(0, 3), label=name) == 0]
        self.ended.update(ended)
        self.failed.update(failed)
        self.running = ()
        self.release()
        event = PassFinished(self.sequence, ended=tuple(ended), failed=tuple(failed))
        self.obey(self.scheduler.handle(event))

    @precondition(lambda self: self.lingers)
    @rule()
    def linger_over(self) -> None:
        self.lingers = False
        self.obey(self.scheduler.handle(LingerOver(self.sequence + 1)))

    @precondition(lambda self: not self.ready)
    @rule()
    def become_ready(self) -> None:
        self.ready = True
        self.obey(self.scheduler.handle(ReplicaReady(self.packed)))

    @precondition(lambda self: self.ready)
    @rule()
    def lose(self) -> None:
        self.ready = self.lingers = False
        self.obey(self.scheduler.handle(ReplicaLost()))
        self.running = ()

    @invariant()
    def nothing_is_lost_or_ended_twice(self) -> None:
        waiting = sum(map(len, self.queued.values())) + len(self.blocked)
        checking = sum(not self.ended[name] for names in self.admitting for name in names)
        running = sum(not self.ended[name] for name in self.running)
        assert all(count <= 1 for count in self.ended.values())
        assert waiting + checking + running + sum(self.ended.values()) == self.count
        statistics = self.scheduler.statistics()
        assert (statistics.queued, statistics.running) == (waiting, running)
        assert statistics.admitting == checking

    @invariant()
    def whoever_waits_for_others_waits_for_one_that_is_here_and_for_none_that_failed(self) -> None:
        for name in self.blocked:
            assert not self.after[name] & self.failed
            assert any(not self.ended[other] for other in self.after[name])

    @invariant()
    def nothing_waits_while_the_replica_is_idle(self) -> None:
        assert self.lingers or not (self.ready and not self.running and self.queued)


TestRandomWalk = RandomWalk.TestCase
TestRandomWalk.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_equal_users_get_equal_shares_of_every_forward() -> None:
    scheduler = ready(10)
    submit(scheduler, "warm", Ticket("warm", 10))
    for user in "abc":
        submit(scheduler, user, *(Ticket(f"{user}{i}", 1) for i in range(30)))

    for sequence in range(1, 6):
        (batch,) = started(scheduler.handle(PassFinished(sequence)))
        shares = Counter(request[0] for request in batch)
        assert len(batch) == 10
        assert max(shares.values()) - min(shares.values()) <= 1
        assert math.isclose(sum(shares.values()), 10)
