"""What goes to the shards for one pass, and what comes out of it for each request."""

from __future__ import annotations

import numpy as np

from ndif_actor.coordinator.admission import Prepared
from ndif_actor.coordinator.events import StartPass, Ticket
from ndif_actor.coordinator.jobs import (
    COPY_BYTES,
    MAX_BUFFERS,
    Job,
    PassReport,
    build_pass,
    new_job,
    outcome,
    statistics_of,
)
from ndif_actor.coordinator.results import Memory
from ndif_actor.coordinator.stream import EventStream
from ndif_actor.messages import Group, GroupResult
from ndif_client.wire.graph import Constant, Graph
from ndif_client.wire.messages import Done, Failed, Fault, SavedTensor, SavedTuple
from ndif_client.wire.tensors import TensorSpec


def spec(nbytes: int, buffer: int) -> TensorSpec:
    return TensorSpec("uint8", (nbytes,), buffer)


async def job(name: str, *constants: bytes, tokens: int = 3) -> Job:
    made = new_job(name, "ann", EventStream([name]), now=10.0)
    nodes = [Constant(spec(len(data), number)) for number, data in enumerate(constants)]
    made.prepared = Prepared(
        ticket=Ticket(name, tokens),
        group=Group(request=name, invokes=[[[1] * tokens]], graph=Graph(list(nodes))),
        buffers=[memoryview(data) for data in constants],
        prompts=[],
    )
    made.started_s = 12.5
    return made


def report(results: dict[str, list[GroupResult]], *buffers: memoryview) -> PassReport:
    return PassReport(results, 0.25, list(buffers), Memory(0, lambda: None))


async def end(made: Job, given: PassReport) -> Done | Failed:
    start = StartPass(1, (made.id,), "packed")
    event = outcome(made, statistics_of(made, start, [made], 0.25), given).event
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
    start = StartPass(1, ("a", "b"), "packed")

    outgoing = outcome(made, statistics_of(made, start, [made], 0.25), report(results, *buffers))

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
    start = StartPass(1, ("a", "b"), "packed")
    jobs = [await job("a"), await job("b")]

    first, second = (outcome(made, statistics_of(made, start, jobs, 0.25), given) for made in jobs)

    assert first.memory is given.memory
    assert first.buffers[0].obj is large.obj
    assert second.memory is None
    small[:] = b"---"
    assert bytes(second.buffers[0]) == b"xyz"


async def test_statistics_tell_what_was_shared() -> None:
    jobs = [await job("a", tokens=3), await job("b", tokens=4)]

    found = statistics_of(jobs[0], StartPass(9, ("a", "b"), "dense"), jobs, 0.25)

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
