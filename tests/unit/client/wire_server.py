"""A small server that speaks the real wire and misbehaves when it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy as np
from aiohttp import web
from aiohttp.test_utils import TestServer

from ndif_client.wire.frames import FrameLimits, encode_frame, split_frame
from ndif_client.wire.graph import Save
from ndif_client.wire.messages import (
    SESSION_HEADER,
    Completion,
    DetokenizeRequest,
    Done,
    DropRequest,
    Event,
    Explanation,
    Explanations,
    Failed,
    Fault,
    FaultReply,
    Generated,
    HeldValues,
    ModelList,
    ModelSummary,
    PromptTokens,
    Queued,
    RowsAtDepth,
    Running,
    SavedTensor,
    Statistics,
    Submission,
    TokenizeReply,
    TokenizeRequest,
    TraceRequest,
)
from ndif_client.wire.tensors import TensorSpec
from tests.unit.client.trees import make_tree

#: What every generation makes: ids, their texts, and what a stream's text grows by.
IDS = [10, 11, 12, 13]
TOKENS = ["to", "ken", " \N{REPLACEMENT CHARACTER}", "s"]
TEXTS = ["to", "ken", "", " s"]

#: What every saved value is.
VALUE = np.arange(6, dtype=np.float32).reshape(2, 3)

Answer = tuple[Event, list[bytes]]


class WireServer:
    """Answers traces with made-up values.

    Attributes:
        submissions: each POST, with its buffers.
        deleted: ids of cancelled traces.
        asked: ids that were asked for, in order.
        dropped: names of held values that were dropped, in order.
        break_after: events of a POST's stream after which the connection is dropped.
        lose: how many POSTs are dropped unread, as a closing keep-alive connection does.
        unfinished: how many times a trace that is asked for is still running.
        hold: set, traces end only when it is.
        hold_after: how many steps of a generation come before it holds.
        finish: after how many tokens generations end by themselves.
        explained: each request that was to be explained, with its buffers.
        refuse: answers every POST with this fault.
        fail: faults of single requests, by the text of their prompt.
        api_key: wanted, if set.
        forget: answers every question for a trace with 404.
    """

    def __init__(self) -> None:
        #: the names that sessions give themselves
        self.sessions: list[str] = []
        self.submissions: list[tuple[Submission, list[memoryview]]] = []
        self.deleted: list[str] = []
        self.asked: list[str] = []
        self.dropped: list[str] = []
        self.break_after: int | None = None
        self.lose = 0
        self.unfinished = 0
        self.hold: asyncio.Event | None = None
        self.hold_after = 0
        self.finish = len(IDS)
        self.explained: list[tuple[Submission, list[memoryview]]] = []
        self.refuse: tuple[int, Fault] | None = None
        self.fail: dict[str, Fault] = {}
        self.api_key: str | None = None
        self.forget = False
        self.url = ""
        self._requests: dict[str, TraceRequest] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[WireServer]:
        """Serve inside of the block."""
        app = web.Application(client_max_size=1 << 30)
        app.add_routes(
            [
                web.get("/v1/models", self._models),
                web.get("/v1/models/{id:.+}", self._model),
                web.post("/v1/models/{id:.+}/tokenize", self._tokenize),
                web.post("/v1/models/{id:.+}/detokenize", self._detokenize),
                web.post("/v1/traces", self._post),
                web.post("/v1/explain", self._explain),
                web.get("/v1/traces/{id}", self._get),
                web.delete("/v1/traces/{id}", self._delete),
                web.post("/v1/sessions/{id}/drop", self._drop),
            ]
        )
        async with TestServer(app) as server:
            self.url = str(server.make_url("")).rstrip("/")
            yield self

    async def _models(self, request: web.Request) -> web.Response:
        self.sessions.append(request.headers[SESSION_HEADER])
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return _refusal(401, Fault(kind="auth", message="an API key is needed"))
        tree = make_tree()
        summary = ModelSummary(
            id=tree.id, dtype=tree.dtype, tensor_parallel=1, packed=True, ready=True
        )
        return _json(ModelList([summary]))

    async def _model(self, request: web.Request) -> web.Response:
        tree = make_tree()
        if request.match_info["id"] != tree.id:
            return _refusal(404, Fault(kind="protocol", message="no such model"))
        return _json(tree)

    async def _tokenize(self, request: web.Request) -> web.Response:
        text = msgspec.json.decode(await request.read(), type=TokenizeRequest).text
        return _json(TokenizeReply([ord(c) for c in text], list(text), text))

    async def _detokenize(self, request: web.Request) -> web.Response:
        ids = msgspec.json.decode(await request.read(), type=DetokenizeRequest).ids
        return _json(TokenizeReply(ids, [chr(i) for i in ids], "".join(map(chr, ids))))

    async def _post(self, request: web.Request) -> web.StreamResponse:
        if self.lose:
            self.lose -= 1
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if self.refuse is not None:
            return _refusal(*self.refuse)
        assert request.content_length is not None
        frame = split_frame(await request.read(), FrameLimits())
        submission = msgspec.msgpack.decode(frame.header, type=Submission)
        self.submissions.append((submission, frame.buffers))
        self._requests.update((r.id, r) for r in submission.requests)
        response = web.StreamResponse()
        await response.prepare(request)
        sent = 0
        async for event, buffers in self._events(submission):
            if sent == self.break_after:
                assert request.transport is not None
                request.transport.abort()
                return response
            await _write(response, event, buffers)
            sent += 1
        return response

    async def _events(self, submission: Submission) -> AsyncIterator[Answer]:
        requests = submission.requests
        for position, each in enumerate(requests):
            yield Queued(each.id, position), []
        for each in requests:
            yield Running(each.id, len(requests)), []
        for step in range(max(map(self._count, requests))):
            if self.hold is not None and step >= self.hold_after:
                await self.hold.wait()
            for each in requests:
                if step < self._count(each):
                    sequences = list(range(sum(len(invoke.prompts) for invoke in each.invokes)))
                    ids, texts = [IDS[step]] * len(sequences), [TEXTS[step]] * len(sequences)
                    yield Generated(each.id, step, sequences, ids, texts), []
        if self.hold is not None:
            await self.hold.wait()
        for each in requests:
            yield self._outcome(each)

    def _count(self, request: TraceRequest) -> int:
        """Return how many tokens a request gets."""
        if request.decoding is None:
            return 0
        return min(request.decoding.max_new_tokens, self.finish)

    def _outcome(self, request: TraceRequest) -> Answer:
        prompt = request.invokes[0].prompts[0]
        if isinstance(prompt, str) and prompt in self.fail:
            return Failed(request.id, self.fail[prompt]), []
        count = self._count(request)
        saves = [
            (number, node, step)
            for step in reversed(range(max(count, 1)))
            for number, node in enumerate(request.graph.nodes)
            if isinstance(node, Save) and step in request.graph.steps_of(number)
        ]
        tensors = [
            SavedTensor(number, node.name, TensorSpec("float32", VALUE.shape, index), step)
            for index, (number, node, step) in enumerate(saves)
        ]
        prompts = [
            [PromptTokens([1, 2], ["a", "b"]) for _ in invoke.prompts] for invoke in request.invokes
        ]
        statistics = Statistics(queue_s=0.0, forward_s=0.1, forward=1, groups=2, tokens=4)
        finish = "length" if count == len(IDS) else "eos"
        completion = Completion(IDS[:count], TOKENS[:count], "".join(TEXTS[:count]), finish)
        done = Done(
            id=request.id,
            prompts=prompts,
            tensors=tensors,
            statistics=statistics,
            completions=[[completion for _ in invoke.prompts] for invoke in request.invokes]
            if request.decoding
            else [],
        )
        return done, [(VALUE + step).tobytes() for _, _, step in saves]

    async def _explain(self, request: web.Request) -> web.Response:
        frame = split_frame(await request.read(), FrameLimits())
        submission = msgspec.msgpack.decode(frame.header, type=Submission)
        self.explained.append((submission, frame.buffers))
        return _json(Explanations([_explanation(each) for each in submission.requests]))

    async def _get(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["id"]
        self.asked.append(name)
        if self.forget or name not in self._requests:
            return _refusal(404, Fault(kind="protocol", message=f"no trace {name} here"))
        unfinished = self.unfinished > 0
        self.unfinished -= unfinished
        response = web.StreamResponse(status=202 if unfinished else 200)
        await response.prepare(request)
        if unfinished:
            await _write(response, Running(name, 1), [])
        else:
            await _write(response, *self._outcome(self._requests[name]))
        return response

    async def _drop(self, request: web.Request) -> web.Response:
        self.dropped += msgspec.json.decode(await request.read(), type=DropRequest).names
        return _json(HeldValues({}))

    async def _delete(self, request: web.Request) -> web.Response:
        self.deleted.append(request.match_info["id"])
        return web.Response(status=204)


def _explanation(request: TraceRequest) -> Explanation:
    return Explanation(
        id=request.id,
        tokens=12,
        value_bytes=3_400_000,
        saved_bytes=512,
        flops=7_000_000_000,
        depth=[RowsAtDepth(0, 12), RowsAtDepth(1, 5), RowsAtDepth(3, 1)],
        row_layers=(22, 36),
        notes=["7 rows leave after layer 0"],
    )


async def _write(response: web.StreamResponse, event: Event, buffers: list[bytes]) -> None:
    for piece in encode_frame(msgspec.msgpack.encode(event), buffers):
        await response.write(bytes(piece))


def _json(message: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(message), content_type="application/json")


def _refusal(status: int, fault: Fault) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(FaultReply(fault)), content_type="application/json"
    )


#: What `session.trace` is given in these tests: saves one value.
SAVE_ONE: Callable[[Any], Any] = lambda m: {"h": m.model.norm.output}  # noqa: E731
