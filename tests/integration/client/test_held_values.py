"""Values that stay on a real server between traces: kept, uploaded, chained, dropped, lost."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import AsyncIterator, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ndif_client import Session, blocking, connect, errors, ops
from ndif_client.wire.graph import Constant, Graph, Held, Keep, Node, Ref, Save
from ndif_client.wire.messages import Submission, TraceRequest
from ndif_client.wire.tensors import TensorSpec
from tests.conftest import MakeModel
from tests.integration.server.harness import Server, running, slow, trace, wire

PROMPT = "The Eiffel Tower is in"
OTHER = "A colosseum stands there"

#: What the users of this file's server may hold.
MAX_HELD_BYTES = 1 << 20


@pytest.fixture(scope="module")
def server(model_folder: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("held") / "server.log"
    limits = {"NDIF_ACTOR_MAX_HELD_BYTES": str(MAX_HELD_BYTES)}
    with running(model_folder("llama"), log, **limits) as server:
        yield server


@pytest.fixture
async def session(server: Server) -> AsyncIterator[Session]:
    async with connect(server.url) as session:
        yield session


@pytest.fixture
def model(session: Session) -> Any:
    return session.model


# ---------------------------------------------------------------- keeping


async def test_a_kept_value_is_used_by_later_traces_as_any_other(
    session: Session, model: Any
) -> None:
    async with session.trace(PROMPT):
        stream = model.model.layers[1].output[:, -1]
        direction = stream.keep("direction")
        sent = stream.save()
    async with session.trace(OTHER):
        plain = model.model.layers[1].output.save()
        logits = model.lm_head.output.save()
    async with session.trace(OTHER):
        model.model.layers[1].output += direction
        steered = model.model.layers[1].output.save()
        changed = model.lm_head.output.save()
        named = (session.held("direction")[0] * 2 - direction.sum(0)).save()

    assert torch.equal(await session.fetch(direction), sent.value)
    assert torch.equal(await session.fetch("direction"), sent.value)
    assert torch.allclose(steered.value, plain.value + sent.value)
    assert not torch.allclose(changed.value, logits.value)
    assert torch.allclose(named.value, sent.value[0])
    spec = TensorSpec("float32", (1, 48))
    assert await session.held_values() == {"direction": spec}


async def test_a_held_value_steers_a_generation(session: Session, model: Any) -> None:
    big = await session.upload(np.full(48, 50, np.float32))
    plain = await session.generate(PROMPT, max_new_tokens=4)
    async with session.generate(PROMPT, max_new_tokens=4) as generation:
        with generation.all():
            model.model.layers[2].output[:] += big * torch.arange(48)

    assert generation.result.new_ids != plain.new_ids


async def test_tuples_are_kept_whole(session: Session, model: Any) -> None:
    async with session.trace(PROMPT):
        top = model.lm_head.output[0, -1].topk(3)
        kept = top.keep()
        indices = top.indices.save()
    async with session.trace():
        again = (kept.indices + 1).save()

    assert torch.equal(again.value, indices.value + 1)
    assert torch.equal((await session.fetch(kept))[1], indices.value)


async def test_all_that_a_trace_keeps_is_held_or_nothing(session: Session, model: Any) -> None:
    await session.upload(np.float32(1), "a")
    with pytest.raises(errors.ExecutionError):
        async with session.trace(PROMPT):
            ops.zeros(2).keep("a")
            ids = model.lm_head.output[:, -1].argmax(-1) + 1000
            ops.embedding(ids, model.model.embed_tokens.weight).keep("b")

    assert await session.held_values() == {"a": TensorSpec("float32", ())}
    assert await session.fetch("a") == 1


async def test_what_a_trace_keeps_is_used_in_itself_as_it_is_there(
    session: Session, model: Any
) -> None:
    await session.upload(np.float32(1), "count")
    async with session.trace():
        count = session.held("count") + 1
        handle = count.keep("count")
        inside = (session.held("count") + handle).save()

    assert float(inside.value) == 4
    assert float(await session.fetch("count")) == 2


async def test_a_held_value_is_not_changed_in_place(session: Session) -> None:
    handle = await session.upload(np.zeros(3, np.float32))
    changes = (
        lambda: handle.zero_(),
        lambda: handle.__setitem__(0, 1.0),
        lambda: handle.__isub__(1.0),
    )
    for change in changes:
        with pytest.raises(errors.GraphError, match="can't be changed in place"):
            async with session.trace():
                change()


async def test_another_session_of_the_same_user_sees_nothing(
    server: Server, session: Session
) -> None:
    handle = await session.upload(np.float32(5), "w")
    async with connect(server.url) as other:
        assert await other.held_values() == {}
        with pytest.raises(errors.GraphError, match="nothing is held as 'w'") as refused:
            await other.fetch("w")
        assert refused.value.fault is not None and refused.value.fault.source is not None
        with pytest.raises(errors.ClosedTraceError, match="held for another session"):
            async with other.trace():
                (handle + 1).save()
        await other.upload(np.float32(6), "w")
        assert float(await other.fetch("w")) == 6
    assert float(await session.fetch("w")) == 5


async def test_a_value_that_never_came_to_be_says_why(session: Session, model: Any) -> None:
    failing = session.trace(PROMPT)
    with failing:
        ids = model.lm_head.output[:, -1].argmax(-1) + 1000
        handle = ops.embedding(ids, model.model.embed_tokens.weight).keep()
    with pytest.raises(errors.GraphError, match=r"has\s+not run"):
        async with session.trace(PROMPT):
            (handle + 1).save()
    with pytest.raises(errors.ExecutionError):
        await failing
    with pytest.raises(errors.GraphError, match="trace that was to keep it has failed"):
        async with session.trace(PROMPT):
            (handle + 1).save()


async def test_traces_awaited_together_run_in_the_order_of_their_handles(
    session: Session, model: Any
) -> None:
    first, second = session.trace(PROMPT), session.trace(OTHER)
    with first:
        kept = model.lm_head.output[:, -1].keep()
        first.sent = model.lm_head.output[:, -1]
    with second:
        second.got = kept * 1

    results = await asyncio.gather(first, second)

    assert torch.equal(results[0].sent, results[1].got)
    assert results[0].statistics.forward < results[1].statistics.forward


# ---------------------------------------------------------------- budgets and ends


async def test_no_more_is_held_for_a_user_than_the_server_allows(
    server: Server, session: Session
) -> None:
    await session.upload(np.zeros(600_000, np.uint8), "most")
    with pytest.raises(errors.LimitError, match=rf"allows {MAX_HELD_BYTES}\. Drop what"):
        await session.upload(np.ones(600_000, np.uint8), "more")
    await session.upload(np.ones(700_000, np.uint8), "most")
    async with connect(server.url) as other:  # without a key, another session is another user
        await other.upload(np.ones(600_000, np.uint8))

    await session.drop("most")
    await session.upload(np.ones(600_000, np.uint8), "more")
    assert list(await session.held_values()) == ["more"]


async def test_dropping_says_what_was_not_there(session: Session) -> None:
    handle = await session.upload(np.float32(1), "w")
    await session.drop(handle)
    with pytest.raises(errors.NoValueError, match="'w'"):
        await session.drop("w")
    with pytest.raises(errors.GraphError, match="nothing is held as 'w'"):
        await session.fetch(handle)


async def test_a_value_without_a_name_goes_with_its_handle(session: Session) -> None:
    handle = await session.upload(np.float32(1))
    kept = await session.upload(np.float32(2))
    assert len(await session.held_values()) == 2
    del handle
    gc.collect()

    await session.fetch(kept)
    async with asyncio.timeout(10):
        while set(await session.held_values()) != {kept.name}:
            await asyncio.sleep(0.01)


async def test_closing_a_session_drops_what_it_held(server: Server, session: Session) -> None:
    async with connect(server.url) as other:
        await other.upload(np.zeros(600_000, np.uint8), "most")

    await session.upload(np.zeros(900_000, np.uint8), "most")


async def test_idle_sessions_are_forgotten(model_folder: MakeModel, tmp_path: Path) -> None:
    with running(model_folder("llama"), tmp_path / "log", NDIF_ACTOR_HELD_FOR_S="0.4") as server:
        async with connect(server.url) as session:
            await session.upload(np.float32(1), "w")
            await asyncio.sleep(1.5)
            with pytest.raises(errors.GraphError, match="nothing is held as 'w'"):
                await session.fetch("w")


async def test_a_killed_shard_loses_what_is_held_and_says_so(
    model_folder: MakeModel, tmp_path: Path
) -> None:
    with running(model_folder("llama"), tmp_path / "log", "--tp", "2") as server:
        async with wire(server) as client, connect(server.url) as session:
            content = np.arange(4, dtype=np.float32)
            handle = await session.upload(content)
            await session.upload(content + 1, "other")
            nodes, buffers = slow(40)
            busy = asyncio.create_task(client.run(trace("", nodes), buffers=buffers))
            await asyncio.sleep(0.5)
            queued = asyncio.create_task(session.fetch("other"))
            await asyncio.sleep(0.3)
            server.shards()[1].send_signal(signal.SIGKILL)
            await busy
            with pytest.raises(errors.ExecutionError, match="'other' is not held any more"):
                await queued
            await client.until_ready()

            with pytest.raises(errors.UnavailableError, match="lost when the model restarted"):
                await session.fetch(handle)
            assert np.array_equal(await session.fetch(await session.upload(content)), content)


async def test_users_of_the_same_session_id_and_name_do_not_meet(
    model_folder: MakeModel, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    users = {name: f"key-of-{name}" for name in ("ann", "bob")}
    lines = [f"{name} {sha256(key.encode()).hexdigest()}" for name, key in users.items()]
    keys.write_text("\n".join(lines))
    options = ("--api-key-file", str(keys))

    def request(*nodes: Node) -> TraceRequest:
        graph = Graph(list(nodes))
        name = f"request-{len(requests)}"
        requests.append(name)
        return TraceRequest(id=name, model="", invokes=[], graph=graph, session="the-session")

    requests: list[str] = []
    with running(model_folder("llama"), tmp_path / "log", *options) as server:
        async with wire(server) as client:
            for number, key in enumerate(users.values()):
                constant = Constant(TensorSpec("float32", (), 0))
                outcome = await client.run(
                    keep := request(constant, Keep(Ref(0), "w")),
                    buffers=[memoryview(np.float32(number).tobytes())],
                    Authorization=f"Bearer {key}",
                )
                assert outcome.done(keep)
            for number, key in enumerate(users.values()):
                outcome = await client.run(
                    read := request(Held("w"), Save(Ref(0), "w")), Authorization=f"Bearer {key}"
                )
                assert outcome.value(read, "w") == number
            async with client.http.delete(
                f"{server.url}/v1/sessions/the-session",
                headers={"Authorization": f"Bearer {users['ann']}"},
            ) as reply:
                assert reply.status == 204
            read = request(Held("w"), Save(Ref(0), "w"))
            outcome = await client.run(read, Authorization=f"Bearer {users['bob']}")
            assert outcome.value(read, "w") == 1
            read = request(Held("w"))
            outcome = await client.run(read, Authorization=f"Bearer {users['ann']}")
            assert "nothing is held" in outcome.failed(read).fault.message


# ---------------------------------------------------------------- without a prompt; uploads


async def test_a_trace_without_a_prompt_runs_what_needs_no_forward(
    session: Session, model: Any
) -> None:
    async with session.trace() as trace:
        projected = model.lm_head(model.model.norm(ops.ones((2, 48)))).save()
        weight = model.model.norm.weight.save()
    traces = [session.trace(), session.trace(PROMPT)]
    for each in traces:
        with each:
            each.w = model.model.norm.weight * 2
    together = await asyncio.gather(*traces)

    assert projected.value.shape == (2, 300)
    assert trace.result.prompts == []
    for result in together:
        assert torch.equal(result.w, weight.value * 2)
    assert (await session.trace(None, lambda m: m.model.norm.weight).explain()).tokens == 0


async def test_a_trace_without_a_prompt_is_refused_where_one_is_needed(session: Session) -> None:
    with pytest.raises(errors.ClosedTraceError, match="which prompt is meant"):
        await session.trace(None, lambda m: m.lm_head.output)
    with pytest.raises(errors.GraphError, match="no prompt"):
        await session.generate()


async def test_the_same_content_is_sent_once(session: Session) -> None:
    sent: list[TraceRequest] = []
    submit = session._submitter.submit

    def noting(request: TraceRequest, *others: Any) -> Any:
        sent.append(request)
        return submit(request, *others)

    session._submitter.submit = noting  # type: ignore[method-assign]
    content = np.arange(1000, dtype=np.float32)
    first = await session.upload(content)
    again = await session.upload(torch.arange(1000, dtype=torch.float32))
    named = await session.upload(content, "named")
    shaped = await session.upload(content.reshape(10, 100))

    assert first.name != again.name  # a change of one is none of the other
    brought = [any(isinstance(n, Constant) for n in one.graph.nodes) for one in sent]
    assert brought == [True, False, False, True]
    for handle, wanted in ((first, content), (named, content), (shaped, content.reshape(10, 100))):
        assert np.array_equal(await session.fetch(handle), wanted)

    await session.upload(np.float32(0), "named")
    assert len(await session.fetch(await session.upload(content, "other"))) == 1000
    await session.drop(first, "other")
    assert len(await session.fetch(await session.upload(content))) == 1000


async def test_what_can_not_be_uploaded_is_refused_in_words(session: Session) -> None:
    for array in ("text", np.array(["a"]), [1, 2]):
        with pytest.raises(errors.GraphError, match="can't be uploaded"):
            await session.upload(array)
    with pytest.raises(errors.GraphError, match="1 to 256 characters"):
        await session.upload(np.zeros(1), "")


async def test_files_of_tensors_go_there_and_back(session: Session, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {
        "a.weight": torch.randn(3, 4),
        "half": torch.randn(5).bfloat16(),
        "ids": torch.arange(7),
        "flag": torch.tensor([True, False]),
        "nothing": torch.zeros(0, 3),
    }
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source, {"made": "here"})

    handles = await session.upload_file(source)
    await session.upload_file(source, prefix="lora.")
    async with session.trace():
        doubled = (handles["half"] * 2).keep("doubled")
    await session.download({**handles, "doubled": doubled, "same": "lora.ids"}, target)

    found = load_file(target)
    wanted = {**tensors, "doubled": tensors["half"] * 2, "same": tensors["ids"]}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    assert "lora.a.weight" in await session.held_values()
    assert [path.name for path in tmp_path.iterdir()].count("out.safetensors") == 1


# ---------------------------------------------------------------- chains


async def test_a_chain_accumulates_in_forwards_that_follow_each_other(
    session: Session, model: Any
) -> None:
    prompts = [f"prompt number {number}" for number in range(20)]
    alone = [
        await session.trace(prompt, lambda m: {"h": m.model.layers[1].output[0, -1]})
        for prompt in prompts
    ]
    await session.upload(np.zeros(48, np.float32), "sum")
    async with session.chain() as chain:
        for prompt in prompts:
            with chain.trace(prompt) as trace:
                total = session.held("sum") + model.model.layers[1].output[0, -1]
                total.keep("sum")
                trace.total = total

    assert len(chain.results) == 20
    wanted = torch.zeros(48)
    for each, result in zip(alone, chain.results, strict=True):
        wanted = wanted + each.h
        assert torch.allclose(result.total, wanted, atol=1e-5)
    assert torch.allclose(await session.fetch("sum"), wanted, atol=1e-5)
    forwards = [result.statistics.forward for result in chain.results]
    assert forwards == list(range(forwards[0], forwards[0] + 20))


async def test_a_chain_type_checks_what_its_members_keep_for_each_other(
    session: Session, model: Any
) -> None:
    async with session.chain() as chain:
        with chain.trace() as first:
            handle = ops.ones((3, 4)).keep()
        with chain.trace() as second:
            second.product = handle @ ops.ones((4, 2))
    assert second.result.product.shape == (3, 2)
    assert first.result.statistics.forward < second.result.statistics.forward

    with pytest.raises(errors.GraphError, match="matmul") as refused:
        async with session.chain() as chain:
            with chain.trace():
                handle = ops.ones((3, 4)).keep("shape")
            with chain.trace():
                (handle @ ops.ones((3, 2))).save()
            with chain.trace():
                (handle + 1).save()
    assert "handle @ ops.ones((3, 2))" in str(refused.value)
    assert "shape" in await session.held_values(), "the first member has run"


async def test_what_comes_after_a_failed_member_fails_with_its_reason(
    session: Session, model: Any
) -> None:
    await session.upload(np.float32(0), "count")
    traces = []
    with pytest.raises(errors.ExecutionError, match="embedding") as failed:
        async with session.chain() as chain:
            for number in range(5):
                with chain.trace(PROMPT) as trace:
                    (session.held("count") + 1).keep("count")
                    if number == 2:
                        ids = model.lm_head.output[:, -1].argmax(-1) + 1000
                        ops.embedding(ids, model.model.embed_tokens.weight).save("bad")
                traces.append(trace)

    assert "has not run" not in str(failed.value)
    assert float(await session.fetch("count")) == 2
    for trace in traces[3:]:
        with pytest.raises(errors.ExecutionError, match="has not run") as after:
            await trace
        assert traces[2].id in str(after.value) and 'save("bad")' in str(after.value)


async def test_cancelling_a_member_ends_those_after_it(session: Session, model: Any) -> None:
    traces = []
    with pytest.raises(errors.TraceCancelledError):
        async with session.chain() as chain:
            for _ in range(3):
                with chain.trace([5] * 200) as trace:
                    trace.h = model.lm_head.output
                traces.append(trace)
            asyncio.get_running_loop().call_later(0.005, _cancel, traces[0])
            asyncio.get_running_loop().call_later(0.0, _cancel, traces[1])
    with pytest.raises(errors.NoValueError):
        _ = traces[2].result
    await session.trace(PROMPT, lambda m: m.lm_head.output)


def _cancel(trace: Any) -> None:
    task = asyncio.ensure_future(trace.cancel())
    _cancelling.add(task)
    task.add_done_callback(_cancelling.discard)


_cancelling: set[asyncio.Task[None]] = set()


async def test_a_chain_may_be_larger_than_one_post(session: Session) -> None:
    content = np.zeros(3_000_000, np.float64)
    async with session.chain() as chain:
        for number in range(5):
            with chain.trace() as trace:
                before = session.held("total") if number else 0.0
                total = (ops.clone(content + number))[:1] + before
                total.keep("total")
                trace.total = total

    assert [float(result.total) for result in chain.results] == [0, 1, 3, 6, 10]


async def test_a_chain_is_recorded_in_its_own_block(session: Session, model: Any) -> None:
    chain = session.chain()
    with pytest.raises(errors.ClosedTraceError, match="inside of its own block"):
        chain.trace(PROMPT)
    with pytest.raises(errors.ClosedTraceError, match="at the end of its own block"):
        async with chain, chain.trace(PROMPT):
            model.lm_head.output.save()
    with pytest.raises(errors.ClosedTraceError, match="runs once"):
        async with chain:
            pass
    with pytest.raises(ZeroDivisionError):
        async with session.chain() as chain:
            with chain.trace(PROMPT):
                model.lm_head.output.save()
            raise ZeroDivisionError


async def test_requests_come_after_known_and_earlier_ones_only(server: Server) -> None:
    async with wire(server) as client:

        def request(name: str, *after: str) -> TraceRequest:
            graph = Graph([Constant(TensorSpec("float32", (0,), 0)), Save(Ref(0), "x")])
            return TraceRequest(id=name, model="", invokes=[], graph=graph, after=list(after))

        empty = [memoryview(b"")]
        unknown = request("unknown-1", "nobody-knows")
        outcome = await client.run(unknown, buffers=empty)
        assert "is not here" in outcome.failed(unknown).fault.message
        first, second = request("circle-1", "circle-2"), request("circle-2", "circle-1")
        outcome = await client.run(first, second, buffers=empty)
        assert "a later one" in outcome.failed(first).fault.message
        assert "after request circle-1" in outcome.failed(second).fault.message
        ended, later = request("ended-long-ago"), request("later-on", "ended-long-ago")
        await client.run(ended, buffers=empty)
        outcome = await client.run(later, buffers=empty)
        assert outcome.done(later)
        again = request("again-and-again", "unknown-1")
        outcome = await client.run(again, buffers=empty)
        assert "after request unknown-1, which has failed" in outcome.failed(again).fault.message
        assert Submission(requests=[again]).requests


def test_plain_scripts_hold_values_too(server: Server, tmp_path: Path) -> None:
    with blocking.connect(server.url) as session:
        model = session.model
        start = session.upload(np.zeros(48, np.float32), "sum")
        with session.chain() as chain:
            for prompt in (PROMPT, OTHER):
                with chain.trace(prompt) as trace:
                    total = session.held("sum") + model.model.layers[0].output[0, -1]
                    total.keep("sum")
                    trace.total = total
        assert torch.equal(session.fetch(start), chain.results[1].total)
        session.download({"sum": start}, tmp_path / "sum.safetensors")
        found = session.upload_file(tmp_path / "sum.safetensors", prefix="file.")
        assert torch.equal(session.fetch(found["sum"]), chain.results[1].total)
        session.drop("file.sum")
        assert list(session.held_values()) == ["sum"]
