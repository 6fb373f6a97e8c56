"""What a type checker sees of the client; checked by mypy, never run."""

from __future__ import annotations

import asyncio
from typing import Any, assert_type

from ndif_client import (
    Envoy,
    NdifError,
    Progress,
    Proxy,
    Result,
    Session,
    Trace,
    blocking,
    connect,
    errors,
    ops,
)
from ndif_client.wire.messages import ModelSummary, ModelTree, PromptTokens, Statistics


async def asynchronous() -> None:
    async with connect("http://127.0.0.1:8000", model="m", api_key="k", tensors="numpy") as session:
        assert_type(session, Session)
        assert_type(session.model, Envoy)
        assert_type(session.tree, ModelTree)
        assert_type(session.tree.num_layers, int)
        assert_type(await session.models(), list[ModelSummary])
        assert_type((await session.tokenize("text")).ids, list[int])
        assert_type(await session.decode([1, 2]), str)

        async with session.trace("prompt") as trace:
            assert_type(trace, Trace)
            hidden = session.model.model.layers[3].output
            assert_type(hidden, Any)
            session.model.model.layers[4].mlp.output[:, -1] = 0
            session.model.lm_head.output = hidden
            trace.hidden = hidden
            with trace.invoke([1, 2, 3]):
                pass
        assert_type(trace.result, Result)
        assert_type(trace.id, str)

        several = [session.trace(prompt) for prompt in ("a", "b")]
        results: list[Result] = await asyncio.gather(*several)
        assert_type(results[0].id, str)
        result = await session.trace("prompt", lambda m: {"h": m.lm_head.output})
        assert_type(result, Result)
        assert_type(result["h"], Any)
        assert_type(result.h, Any)
        assert_type(result.tokens, list[str])
        assert_type(result.statistics, Statistics)
        assert_type(result.prompts[0][0], PromptTokens)

    kept = await connect("local:demo", serve_options=("--tp", "2"))
    assert_type(kept, Session)
    await kept.close()


def operators(value: Proxy) -> None:
    assert_type(value[:, -1], Proxy)
    assert_type(value.save("name"), Proxy)
    assert_type(value.to("float32"), Proxy)
    assert_type(value.value, Any)
    assert_type((2 - value) @ value / 3, Proxy)
    assert_type((value > 0) & ~(value == 1), Proxy)
    value += 1
    assert_type(value.softmax(-1), Any)
    assert_type(ops.where(value, value, 0), Any)


def report(step: Progress) -> None:
    assert_type(step.position, int | None)


def waiting() -> None:
    with blocking.connect("http://127.0.0.1:8000") as session:
        assert_type(session, blocking.BlockingSession)
        with session.trace("prompt", on_progress=report) as trace:
            assert_type(trace, blocking.BlockingTrace)
            trace.h = session.model.lm_head.output
        assert_type(trace.result, Result)
        assert_type(session.trace("prompt", lambda m: m.lm_head.output), Result)
        with session.together():
            pass


def faults(error: NdifError) -> float | None:
    return error.retry_after if isinstance(error, errors.BusyError) else None
