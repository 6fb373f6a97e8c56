"""Requests reach a server, come back, and survive what a network does to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from ndif_client import Progress, Session, connect, errors, ops
from ndif_client.wire.graph import Constant
from ndif_client.wire.messages import Fault
from ndif_client.wire.tensors import check_buffer
from tests.unit.client.wire_server import SAVE_ONE, VALUE, WireServer


@pytest.fixture
async def server() -> AsyncIterator[WireServer]:
    async with WireServer().running() as server:
        yield server


@pytest.fixture
async def live(server: WireServer) -> AsyncIterator[Session]:
    async with connect(server.url, tensors="numpy") as session:
        yield session


async def test_a_trace_comes_back_with_its_values(server: WireServer, live: Session) -> None:
    async with live.trace("text") as trace:
        hidden = live.model.model.norm.output.save()

    assert np.array_equal(hidden.value, VALUE)
    assert np.array_equal(trace.result.hidden, VALUE)
    assert trace.result.tokens == ["a", "b"]
    assert trace.result.statistics.groups == 2
    (submission, _) = server.submissions[0]
    assert submission.requests[0].id == trace.id
    assert submission.requests[0].model == "tiny/model"


async def test_traces_awaited_together_go_out_in_one_post(
    server: WireServer, live: Session
) -> None:
    traces = [live.trace(str(n), SAVE_ONE) for n in range(5)]

    results = await asyncio.gather(*traces)

    assert [len(submission.requests) for submission, _ in server.submissions] == [5]
    assert [result.id for result in results] == [trace.id for trace in traces]


async def test_constants_of_traces_sent_together_keep_apart(
    server: WireServer, live: Session
) -> None:
    def steer(value: float) -> Any:
        vector = np.full(3, value, dtype=np.float32)
        return lambda m: {"h": m.model.norm.output + vector, "v": ops.clone(vector * 2)}

    await asyncio.gather(*(live.trace("x", steer(value)) for value in (1.0, 2.0, 3.0)))

    submission, buffers = server.submissions[0]
    sent = [
        [
            np.frombuffer(check_buffer(node.tensor, buffers), np.float32)[0]
            for node in request.graph.nodes
            if isinstance(node, Constant)
        ]
        for request in submission.requests
    ]
    assert sent == [[1, 2], [2, 4], [3, 6]]


async def test_sessions_without_a_key_tell_themselves_apart_so_that_each_has_its_turn(
    server: WireServer,
) -> None:
    async with connect(server.url) as one, connect(server.url) as two:
        await one.models()
        await two.models()

    assert len(server.sessions) >= 4
    assert len(set(server.sessions)) == 2


async def test_a_result_can_be_awaited_again_and_by_several(
    server: WireServer, live: Session
) -> None:
    trace = live.trace("x", SAVE_ONE)

    first, second = await asyncio.gather(_wait(trace), _wait(trace))

    assert first is second is await trace
    assert len(server.submissions) == 1


async def test_progress_is_told_step_by_step(live: Session) -> None:
    steps: list[Progress] = []

    trace = live.trace("x", SAVE_ONE, on_progress=steps.append)
    await trace

    assert [step.state for step in steps] == ["queued", "running", "done"]
    assert steps[0].position == 0
    assert steps[1].groups == 1
    assert all(step.id == trace.id for step in steps)


async def test_an_error_in_the_callback_is_raised_where_the_trace_is_awaited(
    live: Session,
) -> None:
    def callback(step: Progress) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        await live.trace("x", SAVE_ONE, on_progress=callback)


# ---------------------------------------------------------------- faults


async def test_a_failed_request_raises_its_own_error_and_spares_the_others(
    server: WireServer, live: Session
) -> None:
    server.fail["bad"] = Fault(kind="execution", message="it divided by zero")
    good, bad = live.trace("good", SAVE_ONE), live.trace("bad", SAVE_ONE)

    results = await asyncio.gather(good, bad, return_exceptions=True)

    assert np.array_equal(results[0]["h"], VALUE)
    assert isinstance(results[1], errors.ExecutionError)
    with pytest.raises(errors.ExecutionError, match="divided by zero"):
        await bad
    with pytest.raises(errors.NoValueError, match="divided by zero"):
        _ = bad.result


@pytest.mark.parametrize(
    ("status", "kind", "error"),
    [
        (429, "busy", errors.BusyError),
        (503, "unavailable", errors.UnavailableError),
        (413, "limit", errors.LimitError),
        (400, "protocol", errors.ProtocolError),
        (500, "internal", errors.InternalServerError),
    ],
)
async def test_a_refused_post_raises_what_the_server_says(
    server: WireServer, live: Session, status: int, kind: Any, error: type[errors.NdifError]
) -> None:
    server.refuse = (status, Fault(kind=kind, message="not now", retry_after=3.0))

    with pytest.raises(error, match="not now") as refused:
        await live.trace("x", SAVE_ONE)

    assert refused.value.status == status
    if isinstance(refused.value, errors.BusyError):
        assert refused.value.retry_after == 3.0


# ---------------------------------------------------------------- broken connections


@pytest.mark.parametrize("events", [0, 1, 2, 3, 4, 5])
async def test_a_trace_whose_stream_breaks_is_asked_for_by_its_id(
    server: WireServer, live: Session, events: int
) -> None:
    server.break_after = events
    server.unfinished = 1
    traces = [live.trace(str(n), SAVE_ONE) for n in range(2)]

    results = await asyncio.gather(*traces)

    assert all(np.array_equal(result.h, VALUE) for result in results)
    assert len(server.submissions) == 1
    assert set(server.asked) <= {trace.id for trace in traces}
    assert server.asked


async def test_a_request_that_never_arrived_is_sent_again_once(
    server: WireServer, live: Session
) -> None:
    server.lose = 1
    assert np.array_equal((await live.trace("x", SAVE_ONE)).h, VALUE)
    assert len(server.submissions) == 1

    server.lose = 2
    with pytest.raises(errors.UnavailableError, match="no longer knows this trace"):
        await live.trace("x", SAVE_ONE)


async def test_a_request_that_was_heard_of_is_never_sent_twice(
    server: WireServer, live: Session
) -> None:
    server.break_after, server.forget = 1, True

    with pytest.raises(errors.UnavailableError, match="no longer knows this trace"):
        await live.trace("x", SAVE_ONE)

    assert len(server.submissions) == 1


async def test_an_id_already_in_use_means_that_it_has_arrived(
    server: WireServer, live: Session
) -> None:
    trace = live.trace("x", SAVE_ONE)
    server.refuse = (409, Fault(kind="protocol", message="it is already here"))
    server._requests[trace.id] = _request_of(trace)

    assert np.array_equal((await trace).h, VALUE)


async def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(errors.ConnectError, match=r"can't reach http://127\.0\.0\.1:9"):
        await connect("http://127.0.0.1:9")
    with pytest.raises(errors.ConnectError, match="local:MODEL"):
        await connect("127.0.0.1:8000")


async def test_a_server_that_goes_away_is_named(server: WireServer) -> None:
    async with WireServer().running() as short_lived:
        session = await connect(short_lived.url)
    with pytest.raises(errors.ConnectError, match="can't reach"):
        await session.trace("x", SAVE_ONE)
    await session.close()
    with pytest.raises(errors.ConnectError, match="has been closed"):
        await session.models()


# ---------------------------------------------------------------- cancelling


async def _wait(trace: Any) -> Any:
    return await trace


def _request_of(trace: Any) -> Any:
    from ndif_client.wire.messages import TraceRequest

    recorder = trace._recorder
    return TraceRequest(id=trace.id, model="", invokes=recorder.invokes, graph=recorder.graph())


async def _until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def test_cancelling_the_awaiting_task_cancels_the_trace(
    server: WireServer, live: Session
) -> None:
    server.hold = asyncio.Event()
    trace = live.trace("x", SAVE_ONE)
    task = asyncio.create_task(_wait(trace))
    await _until(lambda: server.submissions)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _until(lambda: server.deleted)

    assert server.deleted == [trace.id]
    with pytest.raises(errors.TraceCancelledError):
        await trace


async def test_a_timeout_cancels_only_its_own_trace(server: WireServer, live: Session) -> None:
    server.hold = asyncio.Event()
    patient, hasty = live.trace("patient", SAVE_ONE), live.trace("hasty", SAVE_ONE)
    waiting = asyncio.create_task(_wait(patient))

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await hasty
    await _until(lambda: server.deleted)
    server.hold.set()

    assert np.array_equal((await waiting).h, VALUE)
    assert server.deleted == [hasty.id]


async def test_a_trace_awaited_by_two_goes_on_for_the_other(
    server: WireServer, live: Session
) -> None:
    server.hold = asyncio.Event()
    trace = live.trace("x", SAVE_ONE)
    first, second = asyncio.create_task(_wait(trace)), asyncio.create_task(_wait(trace))
    await _until(lambda: server.submissions)

    first.cancel()
    await asyncio.sleep(0.05)
    server.hold.set()

    assert np.array_equal((await second).h, VALUE)
    assert server.deleted == []


async def test_a_trace_cancelled_before_it_is_sent_never_goes_out(
    server: WireServer, live: Session
) -> None:
    task = asyncio.create_task(_wait(live.trace("x", SAVE_ONE)))
    asyncio.get_running_loop().call_soon(task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.05)

    assert server.submissions == []


async def test_closing_the_session_cancels_what_is_under_way(server: WireServer) -> None:
    server.hold = asyncio.Event()
    async with connect(server.url) as session:
        trace = session.trace("x", SAVE_ONE)
        task = asyncio.create_task(_wait(trace))
        await _until(lambda: server.submissions)

    with pytest.raises(errors.TraceCancelledError, match="session was closed"):
        await task
    assert server.deleted == [trace.id]


# ---------------------------------------------------------------- the rest of a session


async def test_a_session_knows_its_model_and_tokenizer(live: Session) -> None:
    assert live.tree.id == "tiny/model"
    assert [summary.id for summary in await live.models()] == ["tiny/model"]
    assert (await live.tokenize("ab")).ids == [97, 98]
    assert await live.decode([97, 98]) == "ab"
    assert await live.decode(97) == "a"
    assert await live.decode(np.array([98])) == "b"
    assert await live.decode(np.int64(98)) == "b"
    assert await live.decode(np.array([[97, 98]])) == "ab"
    with pytest.raises(errors.GraphError, match="token ids are integers"):
        await live.decode([[97], [98]])
    assert "tiny/model" in repr(live)


async def test_an_api_key_is_sent_and_its_lack_named(server: WireServer) -> None:
    server.api_key = "secret"

    with pytest.raises(errors.AuthError, match="an API key is needed"):
        await connect(server.url)
    async with connect(server.url, api_key="secret") as session:
        assert session.tree.num_layers == 3


async def test_an_unknown_model_is_named(server: WireServer) -> None:
    with pytest.raises(errors.ProtocolError, match="no such model"):
        await connect(server.url, model="other")


async def test_something_else_than_our_server_is_recognised(server: WireServer) -> None:
    with pytest.raises(errors.ProtocolError, match="answered with status 404"):
        await connect(f"{server.url}/elsewhere")


async def test_results_are_numpy_arrays_or_tensors_as_asked(server: WireServer) -> None:
    import torch

    async with connect(server.url, tensors="torch") as session:
        assert torch.equal((await session.trace("x", SAVE_ONE)).h, torch.tensor(VALUE))
    async with connect(server.url, tensors="numpy") as session:
        assert isinstance((await session.trace("x", SAVE_ONE)).h, np.ndarray)
