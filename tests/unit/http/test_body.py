"""Bodies are bounded before they are read, and refused in words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from ndif_actor.http.body import Uploads, receive_frame, receive_json
from ndif_actor.http.faults import fault_middleware
from ndif_client.wire.frames import encode_frame
from ndif_client.wire.messages import FaultReply, TokenizeRequest

LIMIT = 1000

Client = TestClient[web.Request, web.Application]


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    uploads = Uploads(2 * LIMIT)

    async def frame(request: web.Request) -> web.Response:
        with uploads.room_for(request):
            received = await receive_frame(request, LIMIT)
        return web.json_response([bytes(received.header).decode(), len(received.buffers)])

    async def text(request: web.Request) -> web.Response:
        return web.Response(text=(await receive_json(request, TokenizeRequest)).text)

    async def crash(_: web.Request) -> web.Response:
        raise RuntimeError("a secret detail")

    application = web.Application(middlewares=[fault_middleware])
    application.router.add_post("/frame", frame)
    application.router.add_post("/json", text)
    application.router.add_get("/crash", crash)
    async with TestClient(TestServer(application)) as client:
        yield client


def body(header: bytes, *buffers: bytes) -> bytes:
    return b"".join(encode_frame(header, buffers))


async def fault(client: Client, path: str, data: object) -> tuple[int, str, str]:
    async with client.post(path, data=data) as reply:
        error = msgspec.json.decode(await reply.read(), type=FaultReply).error
        return reply.status, error.kind, error.message


async def test_a_frame_comes_through_whole(client: Client) -> None:
    async with client.post("/frame", data=body(b"head", b"x" * 500, b"")) as reply:
        assert await reply.json() == ["head", 2]


@pytest.mark.parametrize(
    ("data", "status", "kind", "words"),
    [
        (b"", 400, "protocol", "ends in the middle"),
        (b"not a frame at all", 400, "protocol", "not an NDIF frame"),
        (body(b"head", b"x" * 500)[:-1], 400, "protocol", "ends in the middle"),
        (body(b"head") + b"!", 400, "protocol", "goes on after its frame"),
        (b"x" * (LIMIT + 1), 413, "limit", f"the limit is {LIMIT}"),
        (b"NDIF\x01\0\0\0\xff\xff\xff\xff", 400, "protocol", "header of 4294967295 bytes"),
        (b"NDIF\x07\0\0\0\0\0\0\0", 400, "protocol", "frame version 7"),
    ],
)
async def test_a_bad_frame_is_refused_by_name(
    client: Client, data: bytes, status: int, kind: str, words: str
) -> None:
    got = await fault(client, "/frame", data)

    assert got[:2] == (status, kind)
    assert words in got[2]


async def test_a_body_of_unknown_length_is_refused(client: Client) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield body(b"head")

    assert (await fault(client, "/frame", pieces()))[0] == 411


async def test_uploads_together_stay_within_their_bound(client: Client) -> None:
    release = asyncio.Event()

    def slow() -> AsyncIterator[bytes]:
        async def pieces() -> AsyncIterator[bytes]:
            data = body(b"head", b"x" * 900)
            yield data[:100]
            await release.wait()
            yield data[100:]

        return pieces()

    length = {"Content-Length": str(len(body(b"head", b"x" * 900)))}
    held = [asyncio.create_task(_status(client, slow(), length)) for _ in range(2)]
    await asyncio.sleep(0.1)

    status, kind, _ = await fault(client, "/frame", body(b"head", b"x" * 900))
    release.set()

    assert (status, kind) == (429, "busy")
    assert await asyncio.gather(*held) == [200, 200]
    assert await _status(client, body(b"head"), {}) == 200


async def _status(client: Client, data: object, headers: dict[str, str]) -> int:
    async with client.post("/frame", data=data, headers=headers) as reply:
        return reply.status


async def test_json_of_the_wrong_shape_is_refused_with_its_place(client: Client) -> None:
    status, kind, message = await fault(client, "/json", b'{"text": 5}')

    assert (status, kind) == (400, "protocol")
    assert "Expected `str`, got `int` - at `$.text`" in message


async def test_a_crash_tells_a_stranger_nothing(client: Client) -> None:
    async with client.get("/crash") as reply:
        text = await reply.text()

    assert reply.status == 500
    assert "secret" not in text
    assert msgspec.json.decode(text, type=FaultReply).error.kind == "internal"


async def test_a_path_that_does_not_exist_is_a_fault_too(client: Client) -> None:
    status, kind, message = await fault(client, "/nowhere", b"")

    assert (status, kind) == (404, "protocol")
    assert "/nowhere" in message
