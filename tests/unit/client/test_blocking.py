"""The blocking form: the same client, without await, and never inside of a running loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack

import numpy as np
import pytest

from ndif_client import blocking, errors
from ndif_client.blocking import BlockingSession
from ndif_client.wire.messages import Fault
from tests.unit.client.wire_server import IDS, SAVE_ONE, VALUE, WireServer


@pytest.fixture
def server() -> Iterator[WireServer]:
    """A server in a thread of its own, as it would be in a process of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server, stack = WireServer(), AsyncExitStack()
    asyncio.run_coroutine_threadsafe(stack.enter_async_context(server.running()), loop).result()
    yield server
    asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def live(server: WireServer) -> Iterator[BlockingSession]:
    with blocking.connect(server.url, tensors="numpy") as session:
        yield session


def test_a_trace_runs_at_the_end_of_its_block(live: BlockingSession) -> None:
    with live.trace("x") as trace:
        hidden = live.model.model.norm.output.save()
        trace.other = live.model.lm_head.output

    assert np.array_equal(hidden.value, VALUE)
    assert np.array_equal(trace.result.other, VALUE)
    assert np.array_equal(trace.other.value, VALUE)
    assert len(trace.id) == 32


def test_a_function_gives_its_result_at_once(live: BlockingSession) -> None:
    assert np.array_equal(live.trace("x", SAVE_ONE).h, VALUE)


def test_traces_inside_of_together_go_out_in_one_post(
    server: WireServer, live: BlockingSession
) -> None:
    with live.together():
        with live.trace("a"):
            first = live.model.model.norm.output.save()
        with live.trace() as trace, trace.invoke("b"):
            second = live.model.model.norm.output.save()
        with pytest.raises(errors.NoValueError):
            _ = first.value
        with pytest.raises(errors.GraphError, match="no result yet to return"):
            live.trace("c", SAVE_ONE)

    assert np.array_equal(first.value, second.value)
    assert [len(submission.requests) for submission, _ in server.submissions] == [2]


def test_a_generation_is_streamed_and_has_its_result(live: BlockingSession) -> None:
    gen = live.generate("x", max_new_tokens=3)
    tokens = list(gen)

    assert [token.id for token in tokens] == gen.result.new_ids == IDS[:3]
    assert live.generate("x", seed=4).seed == 4
    assert live.generate(messages=[{"role": "user", "content": "x"}]).result.new_ids == IDS
    assert np.array_equal(live.generate("x", SAVE_ONE).h, VALUE)


def test_a_generation_with_a_block_runs_at_its_end(live: BlockingSession) -> None:
    with live.generate("x", max_new_tokens=3) as gen:
        with gen.all():
            each = live.model.model.norm.output.save()
        with gen.steps[1]:
            gen.second = live.model.model.norm.output
        with gen.prefill():
            live.model.model.norm.output = 0
        with pytest.raises(errors.NoValueError):
            _ = gen.result
        with pytest.raises(errors.ClosedTraceError, match="inside of its own block") as refused:
            next(iter(gen))

    assert "threading.py" not in str(refused.value)
    assert len(each.value) == len(list(gen)) == 3
    assert np.array_equal(gen.second.value, VALUE + 1)


def test_generations_run_together_with_traces(server: WireServer, live: BlockingSession) -> None:
    with live.together():
        with live.generate("x") as gen:
            live.model.model.norm.output.save()
        _record(live, "y")
        with pytest.raises(errors.NoValueError):
            _ = gen.result
        with pytest.raises(errors.GraphError, match=r"session\.generate\(\.\.\.\) as gen"):
            live.generate("c", SAVE_ONE)

    assert gen.result.new_ids == IDS
    assert [len(submission.requests) for submission, _ in server.submissions] == [2]


def test_a_trace_is_explained_inside_of_its_block_and_can_be_cancelled(
    live: BlockingSession,
) -> None:
    with live.trace("x") as trace:
        live.model.model.norm.output.save()
        assert live.explain(trace).tokens == trace.explain().tokens == 12
    trace.cancel()
    gen = live.generate("x")
    gen.cancel()

    with pytest.raises(errors.NoValueError, match="cancelled"):
        _ = gen.result


def test_failures_of_together_are_all_raised(server: WireServer, live: BlockingSession) -> None:
    server.fail = {name: Fault(kind="execution", message=name) for name in ("one", "two")}

    with pytest.raises(errors.ExecutionError, match="one"), live.together():
        _record(live, "one")
        _record(live, "fine")
    with pytest.raises(ExceptionGroup) as group, live.together():
        _record(live, "one")
        _record(live, "two")

    assert [str(error) for error in group.value.exceptions] == ["one", "two"]


def _record(session: BlockingSession, prompt: str) -> None:
    with session.trace(prompt):
        session.model.model.norm.output.save()


def test_an_error_inside_of_the_block_is_raised_as_itself(
    server: WireServer, live: BlockingSession
) -> None:
    with pytest.raises(ZeroDivisionError), live.trace("x"):
        _ = 1 / 0

    assert server.submissions == []


def test_an_error_of_the_server_is_raised_at_the_end_of_the_block(
    server: WireServer, live: BlockingSession
) -> None:
    server.refuse = (503, Fault(kind="unavailable", message="draining"))

    with pytest.raises(errors.UnavailableError, match="draining"), live.trace("x"):
        live.model.model.norm.output.save()


def test_the_rest_of_a_session_is_there_too(live: BlockingSession) -> None:
    assert live.tokenize("ab").ids == [97, 98]
    assert live.decode([97, 98]) == "ab"
    assert live.models()[0].id == live.tree.id
    assert "Blocking" in repr(live)


async def test_inside_of_a_running_loop_the_call_to_await_is_named(server: WireServer) -> None:
    with pytest.raises(errors.BlockingCallError, match=r"async with ndif_client\.connect"):
        blocking.connect(server.url)


def test_a_server_that_is_not_there_leaves_no_thread_behind() -> None:
    before = threading.active_count()

    with pytest.raises(errors.ConnectError):
        blocking.connect("http://127.0.0.1:9")

    assert threading.active_count() == before
