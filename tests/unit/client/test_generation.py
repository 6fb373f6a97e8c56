"""Generations: streamed and awaited, with values of steps, through breaks, cancels and ends."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from ndif_client import Generation, Progress, Session, Token, connect, errors
from ndif_client.streaming import TokenLog
from ndif_client.wire.graph import Constant, Steps
from ndif_client.wire.messages import Completion, Fault, Generated
from ndif_client.wire.tensors import check_buffer
from tests.unit.client.trees import finished_graph
from tests.unit.client.wire_server import IDS, SAVE_ONE, TEXTS, VALUE, WireServer

TEXT = "".join(TEXTS)
STREAM = [Token(step, 0, IDS[step], TEXTS[step]) for step in range(len(IDS))]


@pytest.fixture
async def server() -> AsyncIterator[WireServer]:
    async with WireServer().running() as server:
        yield server


@pytest.fixture
async def live(server: WireServer) -> AsyncIterator[Session]:
    async with connect(server.url, tensors="numpy") as session:
        yield session


async def _collect(gen: Generation) -> list[Token]:
    return [token async for token in gen]


async def _wait(gen: Any) -> Any:
    return await gen


async def _until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


# ---------------------------------------------------------------- results


async def test_a_block_records_and_its_values_come_back(server: WireServer, live: Session) -> None:
    model = live.model
    async with live.generate("x", max_new_tokens=4, temperature=0.8, seed=1, stop=["\n"]) as gen:
        first = model.model.norm.output.save()
        with gen.all():
            each = model.model.norm.output[:, -1].save()
        with gen.steps[1:3]:
            some = model.lm_head.output.save()
        with gen.steps[2:3]:
            listed = model.lm_head.output.save()
        with gen.steps[3]:
            last = model.lm_head.output.save()

    assert gen.result.text == TEXT
    assert gen.result.new_ids == IDS
    assert gen.result.completions[0][0].finish == "length"
    assert np.array_equal(first.value, VALUE)
    assert [np.array_equal(value, VALUE + n) for n, value in enumerate(each.value)] == [True] * 4
    assert [value[0, 0] for value in some.value] == [1, 2]
    assert [value[0, 0] for value in listed.value] == [2]
    assert np.array_equal(last.value, VALUE + 3)
    assert gen.result.steps("some") == [1, 2]
    (request,) = server.submissions[0][0].requests
    assert request.decoding is not None
    assert request.decoding.stop == ["\n"]
    assert request.graph.steps_of(2) == Steps()


async def test_a_generation_without_a_block_gives_its_result(
    server: WireServer, live: Session
) -> None:
    result = await live.generate("x", numerics="solo")

    assert result.text == TEXT
    assert len(result) == 0
    assert server.submissions[0][0].requests[0].graph.nodes == []
    assert server.submissions[0][0].requests[0].numerics == "solo"


async def test_a_function_saves_what_it_returns(live: Session) -> None:
    result = await live.generate("x", SAVE_ONE, max_new_tokens=2)

    assert np.array_equal(result.h, VALUE)
    assert result.new_ids == IDS[:2]


async def test_a_result_is_shown_with_its_text_and_the_number_of_steps(live: Session) -> None:
    async with live.generate(["x", "y"]) as gen:
        with gen.all():
            live.model.model.norm.output.save("h")

    assert repr(gen.result).splitlines()[1:] == [
        "  'token s' (4 tokens, length)",
        "  'token s' (4 tokens, length)",
        "  h  4 steps, the first float32[2, 3]",
    ]
    with pytest.raises(errors.NoValueError, match=r"2 completions; use result\.completions"):
        _ = gen.result.text
    assert len(gen.result.completions[0]) == 2


async def test_a_step_that_was_never_reached_has_no_value(
    server: WireServer, live: Session
) -> None:
    server.finish = 2
    async with live.generate("x") as gen:
        with gen.steps[3]:
            never = live.model.model.norm.output.save()
        with gen.steps[3:]:
            none = live.model.model.norm.output.save()
        with gen.steps[1:]:
            one = live.model.model.norm.output.save()

    result = gen.result
    with pytest.raises(errors.NoValueError, match=r"after 2 tokens \(eos\), before step 3"):
        _ = never.value
    assert "ended after 2 tokens" in repr(never)
    assert none.value == []
    assert len(one.value) == 1
    assert result.steps("never") == result.steps("none") == []
    assert result.get("never", 5) == 5
    assert "never  not reached" in repr(result)


async def test_a_trace_has_no_completion(live: Session) -> None:
    result = await live.trace("x", SAVE_ONE)

    with pytest.raises(errors.NoValueError, match="a trace generates nothing"):
        _ = result.text
    assert result.completions == []


async def test_constants_of_generations_sent_together_keep_apart_and_keep_their_steps(
    server: WireServer, live: Session
) -> None:
    def steered(value: float) -> Generation:
        with live.generate("x") as gen, gen.steps[1:]:
            live.model.model.norm.output += np.full(3, value, dtype=np.float32)
        return gen

    await asyncio.gather(steered(1.0), steered(2.0))

    submission, buffers = server.submissions[0]
    for value, request in zip((1.0, 2.0), submission.requests, strict=True):
        (constant,) = (node for node in request.graph.nodes if isinstance(node, Constant))
        assert np.frombuffer(check_buffer(constant.tensor, buffers), np.float32)[0] == value
        assert Steps(1) in request.graph.steps
        assert len(request.graph.during) == len(request.graph.nodes)


# ---------------------------------------------------------------- recording


async def test_a_generation_that_reads_and_saves_nothing_is_refused(
    session: Session, model: Any
) -> None:
    with pytest.raises(errors.GraphError, match="this generation saves nothing"):
        async with session.generate("x"):
            _ = model.lm_head.output
    with session.generate("x") as gen:
        pass
    finished_graph(gen)


async def test_a_generation_needs_a_prompt(session: Session) -> None:
    with pytest.raises(errors.GraphError, match=r"no prompt: session\.generate\(prompt\)"):
        await session.generate()


@pytest.mark.parametrize("name", ["all", "steps", "prefill", "seed", "cancel", "explain", "result"])
def test_a_generations_own_attributes_are_not_names(
    session: Session, model: Any, name: str
) -> None:
    gen = session.generate("x")
    with pytest.raises(errors.GraphError, match=f"its own {name!r}"), gen:
        setattr(gen, name, model.lm_head.output)


async def test_inside_of_its_own_block_it_can_not_be_run(session: Session) -> None:
    gen = session.generate("x")
    with gen:
        with pytest.raises(errors.ClosedTraceError, match="inside of its own block"):
            await gen
        with pytest.raises(errors.ClosedTraceError, match="inside of its own block"):
            await anext(aiter(gen))
    finished_graph(gen)


def test_a_recorded_generation_that_never_runs_is_warned_about(
    session: Session, model: Any
) -> None:
    def record() -> None:
        with session.generate("x"):
            model.lm_head.output.save()

    with pytest.warns(RuntimeWarning, match="the generation recorded at .* never awaited"):
        record()
        gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.generate("nothing is recorded, so nothing is lost")
        gc.collect()


# ---------------------------------------------------------------- streaming


async def test_tokens_are_streamed_as_they_are_made(server: WireServer, live: Session) -> None:
    server.hold, server.hold_after = asyncio.Event(), 2
    gen = live.generate("x")
    tokens = []

    async for token in gen:
        tokens.append(token)
        if len(tokens) == 2:
            with pytest.raises(errors.NoValueError):
                _ = gen.result
            server.hold.set()

    assert tokens == STREAM
    assert gen.result is await gen
    assert "".join(token.text for token in tokens) == gen.result.text
    assert len(server.submissions) == 1


async def test_a_recorded_generation_is_streamed_with_its_values(live: Session) -> None:
    with live.generate("x", max_new_tokens=3) as gen, gen.all():
        each = live.model.model.norm.output.save()

    assert await _collect(gen) == STREAM[:3]
    assert len(each.value) == 3


async def test_streaming_and_awaiting_go_on_at_once(server: WireServer, live: Session) -> None:
    gen = live.generate("x")

    tokens, others, result = await asyncio.gather(_collect(gen), _collect(gen), _wait(gen))

    assert tokens == others == STREAM
    assert result.new_ids == IDS
    assert len(server.submissions) == 1


async def test_every_loop_begins_with_the_first_token(live: Session) -> None:
    gen = live.generate("x")
    await gen

    assert await _collect(gen) == await _collect(gen) == STREAM


async def test_leaving_the_loop_early_does_not_end_the_generation(
    server: WireServer, live: Session
) -> None:
    server.hold, server.hold_after = asyncio.Event(), 1
    gen = live.generate("x")
    async for _ in gen:
        break
    server.hold.set()

    assert (await gen).new_ids == IDS
    assert server.deleted == []


async def test_tokens_of_several_prompts_come_with_their_sequence(live: Session) -> None:
    with live.generate(["x", "y"], max_new_tokens=2) as gen, gen.invoke("z"):
        pass

    tokens = await _collect(gen)

    assert [(token.step, token.sequence) for token in tokens] == [
        *[(0, 0), (0, 1), (0, 2)],
        *[(1, 0), (1, 1), (1, 2)],
    ]
    assert [len(invoke) for invoke in gen.result.completions] == [2, 1]


@pytest.mark.parametrize("events", range(8))
async def test_a_broken_stream_loses_and_doubles_no_token(
    server: WireServer, live: Session, events: int
) -> None:
    server.break_after = events
    server.unfinished = 1
    gen = live.generate("x")

    tokens = await _collect(gen)

    assert [(token.step, token.id) for token in tokens] == list(enumerate(IDS))
    assert "".join(token.text for token in tokens) == gen.result.text == TEXT
    assert len(server.submissions) == 1


def test_a_token_told_twice_or_out_of_turn_comes_once_and_in_order() -> None:
    log = TokenLog()
    for step in (0, 0, 2):
        log.add(Generated("x", step, [0, 1], [step, 10 + step], ["a", "b"]))
    log.complete(
        [
            [Completion([0, 1, 2], ["a", "c", "d"], "acd", "length")],
            [Completion([10], ["b"], "b", "eos")],
        ]
    )

    assert log.ended
    assert log.tokens == [
        *(Token(0, 0, 0, "a"), Token(0, 1, 10, "b")),
        *(Token(1, 0, 1, "c"), Token(2, 0, 2, "d")),
    ]


def test_tokens_from_the_result_have_together_the_text_of_the_result() -> None:
    log = TokenLog()
    log.complete(
        [[Completion([1, 2, 3], ["\N{REPLACEMENT CHARACTER}", "b", "stop"], "éb", "stop")]]
    )

    assert [token.text for token in log.tokens] == ["", "", "éb"]


async def test_a_failure_is_raised_where_the_stream_is_read(
    server: WireServer, live: Session
) -> None:
    server.fail["x"] = Fault(kind="execution", message="it divided by zero")
    gen = live.generate("x")
    tokens = []

    with pytest.raises(errors.ExecutionError, match="divided by zero"):
        async for token in gen:
            tokens.append(token)

    assert tokens == STREAM
    with pytest.raises(errors.NoValueError, match="the generation has failed"):
        _ = gen.result


async def test_progress_counts_the_tokens(live: Session) -> None:
    told: list[Progress] = []
    await live.generate(["x", "y"], max_new_tokens=2, on_progress=told.append)

    assert [step.state for step in told] == [
        *("queued", "running", "generating", "generating", "done")
    ]
    assert [step.tokens for step in told if step.state == "generating"] == [2, 4]


# ---------------------------------------------------------------- cancelling


async def test_a_cancelled_generation_ends_for_all_who_wait(
    server: WireServer, live: Session
) -> None:
    server.hold, server.hold_after = asyncio.Event(), 1
    gen = live.generate("x")
    waiting = asyncio.create_task(_wait(gen))
    async for _ in gen:
        await gen.cancel()
        break

    with pytest.raises(errors.TraceCancelledError, match="generation was cancelled"):
        await waiting
    with pytest.raises(errors.TraceCancelledError):
        await _collect(gen)
    assert server.deleted == [gen.id]
    await gen.cancel()
    assert server.deleted == [gen.id]


async def test_cancelling_the_only_task_that_reads_the_stream_ends_the_generation(
    server: WireServer, live: Session
) -> None:
    server.hold = asyncio.Event()
    gen = live.generate("x")

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await _collect(gen)
    await _until(lambda: server.deleted)

    assert server.deleted == [gen.id]


async def test_a_trace_can_be_cancelled_too_at_any_time(server: WireServer, live: Session) -> None:
    recorded = live.trace("x", SAVE_ONE)
    await recorded.cancel()
    with pytest.raises(errors.TraceCancelledError):
        await recorded

    done = live.trace("x", SAVE_ONE)
    await done
    await done.cancel()
    assert np.array_equal(done.result.h, VALUE)
    assert server.deleted == []

    server.hold = asyncio.Event()
    running = live.trace("x", SAVE_ONE)
    task = asyncio.create_task(_wait(running))
    await _until(lambda: len(server.submissions) == 2)
    await running.cancel()
    with pytest.raises(errors.TraceCancelledError, match="the trace was cancelled"):
        await task
    assert server.deleted == [running.id]


# ---------------------------------------------------------------- explaining


async def test_a_recorded_trace_is_explained_and_still_runs(
    server: WireServer, live: Session
) -> None:
    with live.trace("x") as trace:
        hidden = (live.model.model.norm.output + np.ones(3, np.float32)).save()

    explanation = await live.explain(trace)
    submission, buffers = server.explained[0]
    assert submission.requests[0].id == explanation.id == trace.id
    assert np.frombuffer(buffers[0], np.float32).tolist() == [1, 1, 1]
    assert server.submissions == []
    assert str(explanation).splitlines() == [
        f"{trace.id[:8]}: 12 tokens, values 3.4 MB, result 512 B, 7 GFLOP of its own",
        "  rows per layer: 12 (layer 0), 5 (layers 1-2), 1 (from 3 on)",
        "  computes 22 of 36 rows x layers",
        "  7 rows leave after layer 0",
    ]

    await trace
    assert np.array_equal(hidden.value, VALUE)
    with pytest.raises(errors.ClosedTraceError, match="submitted already"):
        await trace.explain()


async def test_a_generation_is_explained_without_a_block_and_inside_of_one(
    server: WireServer, live: Session
) -> None:
    plain = live.generate("x")
    await plain.explain()
    assert (await plain).text == TEXT
    with live.generate("x") as gen:
        live.model.model.norm.output.save()
        await gen.explain()
        live.model.lm_head.output.save()
    await gen

    kinds = [(s.requests[0].decoding is not None, len(s.requests[0].graph.nodes)) for s, _ in
             server.explained]  # fmt: skip
    assert kinds == [(True, 0), (True, 2)]


async def test_a_trace_that_was_explained_need_not_run(live: Session) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        await live.trace("x", SAVE_ONE).explain()
        gc.collect()
