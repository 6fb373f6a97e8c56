"""What a type checker sees of the client; checked by mypy, never run."""

from __future__ import annotations

import asyncio
from typing import Any, assert_type

from ndif_client import (
    Chain,
    Completion,
    Envoy,
    Explanation,
    Generation,
    Handle,
    NdifError,
    Progress,
    Proxy,
    Result,
    Session,
    Token,
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

        await generation(session)

    kept = await connect("local:demo", serve_options=("--tp", "2"))
    assert_type(kept, Session)
    await kept.close()


async def generation(session: Session) -> None:
    async with session.generate(
        "Once upon", max_new_tokens=20, temperature=0.8, top_p=0.9, seed=1, stop=["\n"]
    ) as gen:
        assert_type(gen, Generation)
        with gen.all():
            gen.each = session.model.lm_head.output
        with gen.steps[1:], gen.invoke(messages=[{"role": "user", "content": "Hi"}]):
            pass
        with gen.steps[3], gen.prefill():
            pass
    assert_type(gen.seed, int)
    assert_type(gen.result.text, str)
    assert_type(gen.result.completion, Completion)
    assert_type(gen.result.completions, list[list[Completion]])
    assert_type(gen.result.new_ids, list[int])
    assert_type(gen.result.new_tokens, list[str])
    assert_type(gen.result.steps("each"), list[int])
    assert_type(gen.result.items(), list[tuple[str, Any]])

    streamed = session.generate(messages=[{"role": "user", "content": "Hi"}], eos=False)
    async for token in streamed:
        assert_type(token, Token)
        assert_type(token.text, str)
    assert_type(await streamed, Result)
    await streamed.cancel()
    several = session.trace(messages=[[{"role": "user", "content": "Hi"}]], numerics="solo")
    assert_type(await session.explain(several), Explanation)
    assert_type(await streamed.explain(), Explanation)


async def held(session: Session, value: Proxy) -> None:
    handle = await session.upload([1.0], "name")
    assert_type(handle, Handle)
    assert_type(value.keep(), Handle)
    assert_type(session.held("name"), Handle)
    assert_type(await session.upload_file("in.safetensors", prefix="lora."), dict[str, Handle])
    await session.download({"weight": handle, "other": "name"}, "out.safetensors")
    await session.drop(handle, "name")
    async with session.chain() as chain:
        assert_type(chain, Chain)
        with chain.trace("prompt", numerics="solo") as trace:
            assert_type(trace, Trace)
            trace.h = handle + value
    assert_type(chain.results, list[Result])


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
    assert_type(step.tokens, int | None)


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
        with session.generate("prompt", max_new_tokens=5, bad_words=["x", [1]]) as gen:
            assert_type(gen, blocking.BlockingGeneration)
            with gen.all():
                gen.each = session.model.lm_head.output
        for token in session.generate("prompt", seed=None, on_progress=report):
            assert_type(token, Token)
        assert_type(gen.result, Result)
        assert_type(gen.explain(), Explanation)
        assert_type(session.generate("prompt", lambda m: m.lm_head.output, top_k=5), Result)


def faults(error: NdifError) -> float | None:
    return error.retry_after if isinstance(error, errors.BusyError) else None
