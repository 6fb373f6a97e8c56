"""One real server on a tiny model, asked everything over real HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import msgspec
import numpy as np
import pytest

from ndif_client import batching, connect
from ndif_client.wire.frames import encode_frame
from ndif_client.wire.graph import (
    Apply,
    Constant,
    HookPoint,
    Items,
    Node,
    ReadHook,
    Ref,
    Save,
    Source,
)
from ndif_client.wire.messages import PROTOCOL, Failed, Queued, Running, Submission
from ndif_client.wire.tensors import TensorSpec
from tests.conftest import MakeModel
from tests.integration.server.harness import (
    Refused,
    Server,
    Wire,
    events_of,
    refusal,
    running,
    save_layer,
    slow,
    trace,
    wire,
)

MODEL = "llama-float32"


@pytest.fixture(scope="module")
def server(model_folder: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    limits = {"NDIF_ACTOR_MAX_QUEUED": "8", "NDIF_ACTOR_MAX_REQUEST_BYTES": str(32 << 20)}
    with running(model_folder("llama"), log, **limits) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Wire]:
    async with wire(server) as client:
        yield client


async def test_a_saved_value_comes_back_with_tokens_and_statistics(client: Wire) -> None:
    request = trace(MODEL, save_layer(1), "abc")

    outcome = await client.run(request)

    done = outcome.done(request)
    assert outcome.of(request) == ["Queued", "Running", "Done"]
    assert outcome.value(request, "h").shape == (1, 3, 48)
    assert done.prompts[0][0].tokens == ["a", "b", "c"]
    assert done.statistics.groups == 1
    assert done.statistics.tokens == 3
    assert done.statistics.forward_s > 0


async def test_requests_of_one_submission_share_a_forward(client: Wire) -> None:
    requests = [trace(MODEL, save_layer(layer), "x" * (layer + 2)) for layer in range(3)]

    outcome = await client.run(*requests)

    statistics = [outcome.done(request).statistics for request in requests]
    assert {each.groups for each in statistics} == {3}
    assert len({each.forward for each in statistics}) == 1
    assert [outcome.value(r, "h").shape[1] for r in requests] == [2, 3, 4]


async def test_users_whose_requests_wait_together_share_a_forward(client: Wire) -> None:
    nodes, buffers = slow(40)
    first = asyncio.create_task(client.run(trace(MODEL, nodes), buffers=buffers))
    await asyncio.sleep(0.3)  # the first forward has begun
    requests = [trace(MODEL, save_layer(0), "shared") for _ in range(3)]

    outcomes = await asyncio.gather(
        *(client.run(r, X_Ndif_Session=f"user-{i}") for i, r in enumerate(requests))
    )

    await first
    forwards = {o.done(r).statistics.forward for o, r in zip(outcomes, requests, strict=True)}
    assert len(forwards) == 1
    assert outcomes[0].done(requests[0]).statistics.groups == 3


async def test_constants_of_different_requests_are_kept_apart(client: Wire) -> None:
    def scaled(buffer: int) -> list[Node]:
        return [
            ReadHook(HookPoint("model.layers.0", "output")),
            Constant(TensorSpec("float32", (1,), buffer)),
            Apply("mul", [Ref(0), Ref(1)]),
            Save(Ref(2), "scaled"),
            Save(Ref(0), "h"),
        ]

    factors = [np.array([value], np.float32).data.cast("B") for value in (2.0, 3.0)]
    two, three = trace(MODEL, scaled(0), "abc"), trace(MODEL, scaled(1), "abc")

    outcome = await client.run(two, three, buffers=factors)

    for request, factor in ((two, 2.0), (three, 3.0)):
        expected = factor * outcome.value(request, "h")
        assert np.array_equal(outcome.value(request, "scaled"), expected)


async def test_a_request_that_can_never_run_is_refused_with_its_line_and_others_go_on(
    client: Wire,
) -> None:
    line = Source("notebook.py", 12, "model.layers[99].output.save()")
    bad = trace(MODEL, save_layer(99), sources=[line])
    good = trace(MODEL, save_layer(0))

    outcome = await client.run(bad, good)

    fault = outcome.failed(bad).fault
    assert outcome.of(bad) == ["Failed"]
    assert fault.kind == "graph"
    assert fault.source == line
    assert outcome.value(good, "h").shape[-1] == 48


@pytest.mark.parametrize(
    ("model", "prompt", "kind", "words"),
    [
        ("other", "a", "protocol", "'other' is not served here"),
        (MODEL, [], "graph", "has no tokens"),
        (MODEL, [5, 300], "graph", "token id 300; the model knows 0 to 299"),
        (MODEL, "x" * 257, "limit", "257 tokens; the model takes 256"),
    ],
)
async def test_a_prompt_that_does_not_fit_the_model_is_refused(
    client: Wire, model: str, prompt: str | list[int], kind: str, words: str
) -> None:
    request = trace(model, save_layer(0), prompt)

    fault = (await client.run(request)).failed(request).fault

    assert fault.kind == kind
    assert words in fault.message


async def test_a_result_can_be_fetched_again_until_it_is_deleted(client: Wire) -> None:
    request = trace(MODEL, save_layer(1))
    outcome = await client.run(request)

    assert await client.fetch(request.id) == (200, outcome.done(request))
    assert await client.delete(request.id) == 204
    assert await client.delete(request.id) == 404
    with pytest.raises(Refused) as caught:
        await client.fetch(request.id)
    assert caught.value.status == 404


async def test_a_client_that_goes_away_finds_its_result_later(client: Wire) -> None:
    nodes, buffers = slow(5)
    request = trace(MODEL, nodes)
    async with client.post(request, buffers=buffers) as events:
        assert isinstance((await anext(events))[0], Queued)

    status, event = await client.fetch(request.id)
    assert status == 202
    assert isinstance(event, Queued | Running)
    while status == 202:
        await asyncio.sleep(0.05)
        status, event = await client.fetch(request.id)
    assert type(event).__name__ == "Done"


async def test_an_id_in_use_is_a_conflict(client: Wire) -> None:
    request = trace(MODEL, save_layer(1))
    await client.run(request)

    with pytest.raises(Refused, match="is already here") as caught:
        await client.run(request)

    assert caught.value.status == 409


async def test_a_full_queue_answers_429_with_retry_after_and_recovers(client: Wire) -> None:
    nodes, buffers = slow(10)
    held = [trace(MODEL, nodes)] + [trace(MODEL, save_layer(0)) for _ in range(7)]
    async with client.post(*held, buffers=buffers) as events:
        await anext(events)

        with pytest.raises(Refused, match="8 of at most 8 requests") as caught:
            await client.run(trace(MODEL, save_layer(0)))

        assert caught.value.status == 429
        assert caught.value.fault.kind == "busy"
        assert int(caught.value.headers["Retry-After"]) >= 1
        async for _ in events:
            pass
    again = trace(MODEL, save_layer(0))
    assert (await client.run(again)).done(again)


async def test_a_chain_longer_than_the_queue_is_sent_as_room_comes(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "MAX_REQUESTS", 4)  # a POST
    async with connect(server.url) as session:
        await session.upload(np.zeros(48, np.float32), "total")

        async with session.chain() as chain:
            for number in range(1, 31):
                with chain.trace("x" * number) as step:
                    total = session.held("total") + session.model.layers[1].resid[0, -1]
                    total.keep("total")
                    step.total = total

        rows = [result.total for result in chain.results]
        last = await session.fetch(session.held("total"))
    assert len(rows) == 30
    assert np.array_equal(last, rows[-1])
    assert len({row.tobytes() for row in map(np.asarray, rows)}) == 30


async def test_a_queued_and_a_running_request_can_be_cancelled(client: Wire) -> None:
    nodes, buffers = slow(20)
    running_request, queued = trace(MODEL, nodes), trace(MODEL, save_layer(0))
    first = asyncio.create_task(client.run(running_request, buffers=buffers))
    await asyncio.sleep(0.3)
    second = asyncio.create_task(client.run(queued))
    await asyncio.sleep(0.1)

    assert [await client.delete(r.id) for r in (queued, running_request)] == [204, 204]

    assert (await second).failed(queued).fault.kind == "cancelled"
    assert (await first).failed(running_request).fault.kind == "cancelled"
    after = trace(MODEL, save_layer(0))
    assert (await client.run(after)).done(after)


async def test_large_values_arrive_whole(client: Wire) -> None:
    nodes: list[Node] = [
        Constant(TensorSpec("float32", (1000, 5000), 0)),
        Apply("add", [Ref(0), 1]),
        Save(Ref(1), "large"),
    ]
    value = np.random.default_rng(0).standard_normal((1000, 5000), np.float32)
    for _ in range(3):
        request = trace(MODEL, nodes)
        outcome = await client.run(request, buffers=[value.data.cast("B")])
        assert np.array_equal(outcome.value(request, "large"), value + 1)


# ---------------------------------------------------------------- bad bodies


async def post_bytes(client: Wire, data: object, **headers: str) -> Refused:
    target = f"{client.url}/v1/traces"
    async with client.http.post(target, data=data, headers=headers) as reply:
        return await refusal(reply)


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"garbage, and long enough to be a prelude", 400, "not an NDIF frame"),
        (b"".join(encode_frame(b"\xc1")), 400, "holds no submission"),
        (b"".join(encode_frame(b"\x80")), 400, "missing required field `requests`"),
        (bytes((32 << 20) + 1), 413, "the limit is 33554432"),
    ],
)
async def test_a_malformed_or_oversized_body_is_refused_by_name(
    client: Wire, data: bytes, status: int, words: str
) -> None:
    refused = await post_bytes(client, data)

    assert refused.status == status
    assert words in refused.fault.message


async def test_a_submission_nested_without_end_is_refused(client: Wire) -> None:
    request = trace(MODEL, [Apply("stack", [Items([])])])
    plain = msgspec.msgpack.encode(Submission(requests=[request]))
    empty = msgspec.msgpack.encode(Items([]))
    nested = empty[:-1] + b"\x91"  # its list now holds one item: whatever follows

    for levels, words in ((100_000, "nested too deeply"), (50, "lists within lists")):
        header = plain.replace(empty, nested * levels + empty)
        refused_or_failed = await _post_header(client, header)
        assert words in refused_or_failed


async def _post_header(client: Wire, header: bytes) -> str:
    """Return what a submission is refused with, or what its only request fails with."""
    target, data = f"{client.url}/v1/traces", b"".join(encode_frame(header))
    async with client.http.post(target, data=data) as reply:
        if reply.status >= 400:
            return (await refusal(reply)).fault.message
        (event,) = [event async for event, _ in events_of(reply)]
        assert isinstance(event, Failed)
        return event.fault.message


async def test_a_body_that_only_announces_too_much_is_refused_unread(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/traces HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\n")

    assert b" 413 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()
    await writer.wait_closed()


async def test_the_server_survives_connections_cut_at_any_point(
    server: Server, client: Wire
) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for cut in (b"", b"POST", b"POST /v1/traces HTTP/1.1\r\nContent-Length: 50\r\n\r\nNDIF"):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(cut)
        writer.close()
        await writer.wait_closed()

    request = trace(MODEL, save_layer(0))
    assert (await client.run(request)).done(request)


# ---------------------------------------------------------------- the rest of the HTTP face


async def test_the_model_is_listed_and_described(client: Wire) -> None:
    status, models = await client.get_json("/v1/models")
    assert status == 200
    assert models["data"][0] == {
        "id": MODEL,
        "object": "model",
        "dtype": "float32",
        "tensor_parallel": 1,
        "packed": True,
        "ready": True,
    }

    status, tree = await client.get_json(f"/v1/models/{MODEL}")
    assert status == 200
    assert tree["root"]["kind"] == "LlamaForCausalLM"
    assert tree["vocab_size"] == 300
    assert (await client.get_json("/v1/models/other"))[0] == 404


async def test_text_becomes_tokens_and_text_again(client: Wire) -> None:
    base = f"{client.url}/v1/models/{MODEL}"
    async with client.http.post(f"{base}/tokenize", json={"text": "hi"}) as reply:
        tokens = await reply.json()
    async with client.http.post(f"{base}/detokenize", json={"ids": tokens["ids"]}) as reply:
        assert await reply.json() == tokens
    async with client.http.post(f"{base}/detokenize", json={"ids": [300]}) as reply:
        refused = await refusal(reply)

    assert tokens["tokens"] == ["h", "i"]
    assert tokens["text"] == "hi"
    assert "token id 300" in refused.fault.message


async def test_probes_and_documents_answer(client: Wire) -> None:
    assert await client.get_json("/health") == (200, {"status": "ok"})
    status, ready = await client.get_json("/ready")
    assert (status, ready["ready"]) == (200, True)
    status, version = await client.get_json("/version")
    assert (status, version["protocol"]) == (200, PROTOCOL)

    status, document = await client.get_json("/openapi.json")
    assert status == 200
    assert document["openapi"] == "3.1.0"
    referred = set(_references(document))
    assert referred <= {
        f"#/components/schemas/{name}" for name in document["components"]["schemas"]
    }
    assert "/v1/models/{id}/tokenize" in document["paths"]


def _references(document: object) -> Iterator[str]:
    if isinstance(document, dict):
        for key, value in document.items():
            if key == "$ref":
                yield value
            else:
                yield from _references(value)
    elif isinstance(document, list):
        for value in document:
            yield from _references(value)


async def test_logs_are_json_lines(server: Server) -> None:
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]

    assert {"coordinator", "shard"} <= {line["actor"] for line in lines}
    assert all({"event", "level", "timestamp"} <= line.keys() for line in lines)
