"""What goes to the shards for one pass, and what comes out of it for each request."""

from __future__ import annotations

import numpy as np

from ndif_actor.coordinator.admission import Prepared
from ndif_actor.coordinator.completions import GrowingCompletion
from ndif_actor.coordinator.events import Continuation, Grown, StartPass, Ticket
from ndif_actor.coordinator.gathering import COPY_BYTES, MAX_BUFFERS
from ndif_actor.coordinator.jobs import (
    Job,
    PassReport,
    advance,
    build_pass,
    count_pass,
    new_job,
)
from ndif_actor.coordinator.results import Memory, Outgoing
from ndif_actor.coordinator.stream import EventStream
from ndif_actor.messages import Feed, Group, GroupResult, Part
from ndif_client.wire.graph import Constant, Graph
from ndif_client.wire.messages import (
    Decoding,
    Done,
    Failed,
    Fault,
    Generated,
    PromptTokens,
    SavedTensor,
    SavedTuple,
)
from ndif_client.wire.tensors import TensorSpec


def spec(nbytes: int, buffer: int) -> TensorSpec:
    return TensorSpec("uint8", (nbytes,), buffer)


async def job(name: str, *constants: bytes, tokens: int = 3) -> Job:
    made = new_job(name, "ann", EventStream([name]), now=10.0)
    nodes = [Constant(spec(len(data), number)) for number, data in enumerate(constants)]
    made.prepared = Prepared(
        ticket=Ticket(name, tokens),
        group=Group(request=name, invokes=[[[1] * tokens]], graph=Graph(list(nodes)), sharing=0),
        buffers=[memoryview(data) for data in constants],
        prompts=[],
    )
    made.started_s = 12.5
    return made


def report(results: dict[str, list[GroupResult]], *buffers: memoryview) -> PassReport:
    return PassReport(results, 0.25, list(buffers), Memory(0, lambda: None))


def ended(made: Job, given: PassReport, *others: Job) -> Outgoing:
    """Run the one pass of a trace; return its last event."""
    start = StartPass(1, (made.id,), "packed")
    count_pass(made, start, [made, *others], 0.25, 1)
    with given.memory:
        last = advance(made, given, 20.0).last
    assert last is not None
    return last


async def end(made: Job, given: PassReport) -> Done | Failed:
    event = ended(made, given).event
    assert isinstance(event, Done | Failed)
    return event


async def test_constants_of_all_groups_lie_in_one_list_of_buffers() -> None:
    jobs = [await job("a", b"a0", b"a1"), await job("b"), await job("c", b"c0")]

    message, buffers = build_pass(StartPass(7, ("a", "b", "c"), "packed"), jobs)

    assert [bytes(buffer) for buffer in buffers] == [b"a0", b"a1", b"c0"]
    places = [
        [node.tensor.buffer for node in group.graph.nodes if isinstance(node, Constant)]
        for group in message.groups
    ]
    assert places == [[0, 1], [], [2]]
    assert (message.sequence, message.layout) == (7, "packed")


async def test_each_request_gets_its_own_buffers_renumbered() -> None:
    buffers = [memoryview(bytes([number])) for number in range(5)]
    results = {
        "a": [GroupResult(request="a", tensors=[SavedTensor(1, "x", spec(1, 4))])],
        "b": [
            GroupResult(
                request="b",
                tensors=[SavedTensor(2, None, spec(1, 0))],
                tuples=[SavedTuple(3, "t", ["v", "i"], [spec(1, 3), spec(1, 1)])],
            )
        ],
    }
    made = await job("b")

    outgoing = ended(made, report(results, *buffers))

    assert isinstance(outgoing.event, Done)
    assert [bytes(buffer) for buffer in outgoing.buffers] == [b"\0", b"\3", b"\1"]
    assert outgoing.event.tensors[0].tensor.buffer == 0
    assert [item.buffer for item in outgoing.event.tuples[0].items] == [1, 2]


async def test_large_values_stay_where_they_are_and_small_ones_let_the_memory_go() -> None:
    large = memoryview(np.zeros(COPY_BYTES + 1, np.uint8).data)
    small = memoryview(bytearray(b"xyz"))
    given = report(
        {
            "a": [
                GroupResult(
                    request="a",
                    tensors=[SavedTensor(0, None, spec(large.nbytes, 0))],
                )
            ],
            "b": [GroupResult(request="b", tensors=[SavedTensor(0, None, spec(3, 1))])],
        },
        large,
        small,
    )
    with given.memory:
        first, second = ended(await job("a"), given), ended(await job("b"), given)

    assert first.memories == (given.memory,)
    assert first.buffers[0].obj is large.obj
    assert second.memories == ()
    small[:] = b"---"
    assert bytes(second.buffers[0]) == b"xyz"


async def test_statistics_tell_what_was_shared() -> None:
    jobs = [await job("a", tokens=3), await job("b", tokens=4)]

    count_pass(jobs[0], StartPass(9, ("a", "b"), "dense"), jobs, 0.25, 1)

    found = jobs[0].statistics
    assert found is not None
    assert (found.forward, found.groups, found.tokens) == (9, 2, 7)
    assert (found.queue_s, found.forward_s, found.numerics) == (2.5, 0.25, "solo")


async def test_a_fault_of_any_rank_fails_the_request_alone() -> None:
    fault = Fault(kind="execution", message="index out of bounds")
    results = {"a": [GroupResult(request="a"), GroupResult(request="a", fault=fault)]}

    event = await end(await job("a"), report(results))

    assert event == Failed("a", fault)


async def test_a_request_the_shards_forgot_is_answered_all_the_same() -> None:
    event = await end(await job("a"), report({}))

    assert isinstance(event, Failed)
    assert event.fault.kind == "internal"


async def test_more_tensors_than_a_frame_carries_are_a_limit() -> None:
    many = SavedTuple(0, None, [], [spec(1, 0)] * (MAX_BUFFERS + 1))
    results = {"a": [GroupResult(request="a", tuples=[many])]}

    event = await end(await job("a"), report(results, memoryview(b"x")))

    assert isinstance(event, Failed)
    assert event.fault.kind == "limit"
    assert f"{MAX_BUFFERS + 1} tensors" in event.fault.message


class Letters:
    """Token 1 reads "a", token 2 "b", and so on."""

    def add(self, token: int) -> str:
        return chr(96 + token)

    def end(self) -> str:
        return ""


def generation(name: str, *prompts: list[int], new: int = 2) -> Job:
    made = new_job(name, "ann", EventStream([name]), now=10.0)
    made.started_s = 12.5
    decoding = Decoding(max_new_tokens=new, eos=[9])
    completions = [
        GrowingCompletion(
            eos=[9],
            stop=[],
            max_new_tokens=new,
            stream=Letters(),
            pieces=lambda ids: [chr(96 + token) for token in ids],
        )
        for _ in prompts
    ]
    made.prepared = Prepared(
        ticket=Ticket(
            name,
            sum(map(len, prompts)),
            continuation=Continuation(prompts=list(prompts), max_new_tokens=new),
        ),
        group=Group(
            request=name,
            invokes=[[ids] for ids in prompts],
            graph=Graph(),
            sharing=0,
            decoding=decoding,
        ),
        buffers=[],
        prompts=[[PromptTokens(ids, [])] for ids in prompts],
        completions=completions,
    )
    return made


def first_pass(name: str, *counts: int, cached: list[list[int]] | None = None) -> StartPass:
    part = Part(name, [Feed(count) for count in counts])
    return StartPass(4, (name,), "packed", (part,), {name: cached or [[]]})


async def test_a_generation_joins_with_the_pages_that_are_known_already() -> None:
    start = first_pass("g", 2, cached=[[5]])

    message, _ = build_pass(start, [generation("g", [1] * 6), await job("other")])

    assert [group.request for group in message.groups] == ["g"]
    assert message.groups[0].cached == [[5]]
    assert message.parts == list(start.parts)


async def test_tokens_are_told_step_by_step_and_completed_at_the_end() -> None:
    made = generation("g", [1] * 6, [2])
    count_pass(made, first_pass("g", 2, 1, cached=[[5], []]), [made], 0.25, 4)

    step = advance(made, report({"g": [GroupResult(request="g", tokens=[3, 9])]}), 13.0)

    assert step.generated == Generated("g", 0, [0, 1], [3, 9], ["c", "i"])
    assert step.grown == Grown("g", (3, 9), (False, True))
    assert step.last is None
    going_on = StartPass(5, (), "packed", (Part("g", [Feed(1), Feed(0)]),))
    count_pass(made, going_on, [made], 0.5, 4)
    step = advance(made, report({"g": [GroupResult(request="g", tokens=[4, None])]}), 14.0)

    assert step.generated == Generated("g", 1, [0], [4], ["d"])
    assert step.last is not None
    done = step.last.event
    assert isinstance(done, Done)
    found = [(c.ids, c.text, c.finish) for [c] in done.completions]
    assert found == [([3, 4], "cd", "length"), ([9], "i", "eos")]
    assert done.statistics.first_token_s == 3.0
    assert (done.statistics.forward, done.statistics.forwards) == (4, 2)
    assert (done.statistics.forward_s, done.statistics.cached_tokens) == (0.75, 4)


async def test_a_piece_of_a_prompt_makes_no_token() -> None:
    made = generation("g", [1] * 6)
    count_pass(made, first_pass("g", 2), [made], 0.25, 4)

    step = advance(made, report({"g": [GroupResult(request="g", tokens=[None])]}), 13.0)

    assert step.generated is None
    assert step.grown == Grown("g", (None,), (False,))


async def test_values_of_all_steps_come_in_one_frame_and_hold_the_memory_of_each() -> None:
    made, given_back = generation("g", [1]), []
    large = COPY_BYTES + 1
    for step in (0, 1):
        memory = Memory(large, lambda step=step: given_back.append(step))
        saved = SavedTensor(3, "x", spec(large, 0), step)
        result = GroupResult(request="g", tensors=[saved], tokens=[4])
        count_pass(made, first_pass("g", 1), [made], 0.25, 4)
        with memory:
            passed = PassReport({"g": [result]}, 0.25, [memoryview(bytes(large))], memory)
            last = advance(made, passed, 13.0).last

    assert last is not None
    assert isinstance(last.event, Done)
    assert [(one.step, one.tensor.buffer) for one in last.event.tensors] == [(0, 0), (1, 1)]
    last.hold()
    made.gathered.let_go()
    assert given_back == []
    last.drop()
    assert given_back == [0, 1]


async def test_a_fault_at_any_step_fails_the_generation() -> None:
    made = generation("g", [1])
    fault = Fault(kind="execution", message="index out of bounds")
    count_pass(made, first_pass("g", 1), [made], 0.25, 4)

    step = advance(made, report({"g": [GroupResult(request="g", fault=fault)]}), 13.0)

    assert step.grown is None
    assert step.last is not None
    assert step.last.event == Failed("g", fault)
