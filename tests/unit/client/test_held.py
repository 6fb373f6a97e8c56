"""Handles: how they are recorded, and what is sent of them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from ndif_client import Handle, Session, connect, errors, ops
from ndif_client.wire.graph import Held, Keep, ReadHook, Ref
from tests.unit.client.trees import finished_graph, make_session
from tests.unit.client.wire_server import WireServer


@pytest.fixture
async def server() -> AsyncIterator[WireServer]:
    async with WireServer().running() as server:
        yield server


@pytest.fixture
async def live(server: WireServer) -> AsyncIterator[Session]:
    async with connect(server.url, tensors="numpy") as session:
        yield session


def test_keeping_records_a_node_and_gives_a_handle(session: Session, model: Any) -> None:
    trace = session.trace("x")
    with trace:
        handle = model.model.norm.output.keep("norm")

    nodes = finished_graph(trace).nodes
    assert [type(node) for node in nodes] == [ReadHook, Keep]
    assert nodes[1] == Keep(Ref(0), "norm")
    assert repr(handle) == "Handle('norm')"


def test_a_handle_is_recorded_once_and_used_as_a_value(session: Session) -> None:
    handle = session.held("w")
    trace = session.trace()
    with trace:
        ops.stack([handle, handle * 2, 1 - handle, -handle, handle[0]]).save("all")
        (np.ones(2) + handle).sum().save("sum")
        handle.topk(2).values.save("top")

    nodes = finished_graph(trace).nodes
    assert sum(isinstance(node, Held) for node in nodes) == 1


def test_a_held_value_of_a_generation_is_there_at_every_step(session: Session, model: Any) -> None:
    handle = session.held("w")
    generation = session.generate("x", max_new_tokens=3)
    with generation, generation.all():
        model.model.norm.output[:] += handle

    graph = finished_graph(generation)
    held = next(n for n, node in enumerate(graph.nodes) if isinstance(node, Held))
    assert graph.steps_of(held).single


@pytest.mark.parametrize("name", ["", "x" * 257, 5])
def test_names_have_bounds(session: Session, name: Any) -> None:
    with pytest.raises(errors.GraphError, match="1 to 256 characters"):
        session.held(name)


def test_what_is_kept_last_under_a_name_is_held(session: Session) -> None:
    with session.trace() as trace:
        ops.zeros(2).keep("w")
        ops.zeros(3).keep("w")
    kept = [node for node in finished_graph(trace).nodes if isinstance(node, Keep)]
    assert [(node.name, node.value.node) for node in kept] == [("w", 2)]


def test_a_handle_means_something_only_in_traces_of_its_session(session: Session) -> None:
    handle = session.held("w")
    with pytest.raises(errors.ClosedTraceError, match="the held value 'w'"):
        handle + 1
    other = make_session()
    with other.trace() as trace:
        with pytest.raises(errors.ClosedTraceError, match="held for another session"):
            handle + 1
        ops.zeros(2).keep("w")
    finished_graph(trace)


async def test_requests_say_whose_held_values_they_use_and_what_they_come_after(
    server: WireServer, live: Session
) -> None:
    first, second = live.trace("a"), live.trace("b")
    with first:
        handle = live.model.model.norm.output.keep()
    with second:
        second.h = handle + 1
    await asyncio.gather(first, second)
    async with live.trace("c") as third:
        third.h = handle + 2

    sent = [request for submission, _ in server.submissions for request in submission.requests]
    assert [request.after for request in sent] == [[], [first.id], []]
    assert len({request.session for request in sent}) == 1
    assert sent[0].session is not None


async def test_a_chain_is_sent_in_one_post_in_order(server: WireServer, live: Session) -> None:
    async with live.chain() as chain:
        for number in range(4):
            with chain.trace(str(number)) as trace:
                trace.h = live.model.model.norm.output

    ((submission, _),) = server.submissions
    ids = [trace.id for trace in chain.traces]
    assert [request.id for request in submission.requests] == ids
    assert [request.after for request in submission.requests] == [[], *([one] for one in ids[:3])]
    assert len(chain.results) == 4


async def test_what_needs_another_post_is_sent_when_that_has_arrived(
    server: WireServer, live: Session
) -> None:
    half = np.zeros(5_000_000, np.float64)
    async with live.chain() as chain:
        for number in range(4):
            with chain.trace(str(number)) as trace:
                trace.h = live.model.model.norm.output + (half + number)

    order = [[r.id for r in submission.requests] for submission, _ in server.submissions]
    assert order == [[trace.id] for trace in chain.traces]


async def test_values_that_nobody_can_use_are_dropped_by_the_way(
    server: WireServer, live: Session
) -> None:
    async with live.trace("a"):
        handle: Handle | None = live.model.model.norm.output.keep()
        live.model.model.norm.output.keep("named")
    assert handle is not None
    name = handle.name
    handle = None
    gc.collect()
    async with live.trace("b") as trace:
        trace.h = live.model.model.norm.output
    async with asyncio.timeout(5):
        while not server.dropped:
            await asyncio.sleep(0.01)

    assert server.dropped == [name]
