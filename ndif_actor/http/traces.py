"""POST /v1/traces and what follows it: fetch a result again, cancel; and POST /v1/explain."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import msgspec
from aiohttp import web

from ndif_actor.coordinator.coordinator import KnownRequestError
from ndif_actor.coordinator.stream import EventStream
from ndif_actor.http.body import check_length, receive_frame
from ndif_actor.http.faults import HttpFault
from ndif_actor.http.frames import FrameWriter, start_frames
from ndif_actor.http.keys import AUTHENTICATOR, CONFIG, COORDINATOR, UPLOADS
from ndif_client.wire.frames import Frame
from ndif_client.wire.messages import Done, Failed


async def post_traces(request: web.Request) -> web.StreamResponse:
    """Admit a submission and stream the events of its requests until each has ended."""
    caller = request.app[AUTHENTICATOR].caller(request)
    coordinator = request.app[COORDINATOR]
    try:
        async with _submission(request) as frame:
            stream = await coordinator.submit(frame, owner=caller.owner, user=caller.user)
    except KnownRequestError as error:
        raise HttpFault("protocol", str(error), status=409) from None
    try:
        return await _write_events(request, stream)
    finally:
        stream.close()


async def post_explain(request: web.Request) -> web.Response:
    """Say what each request of a submission would cost, and run nothing."""
    caller = request.app[AUTHENTICATOR].caller(request)
    async with _submission(request) as frame:
        explanations = await request.app[COORDINATOR].explain(
            frame, owner=caller.owner, user=caller.user
        )
    return web.Response(body=msgspec.json.encode(explanations), content_type="application/json")


@contextlib.asynccontextmanager
async def _submission(request: web.Request) -> AsyncIterator[Frame]:
    """Receive the frame of a submission; its room is reserved while it is decoded."""
    request.app[COORDINATOR].check_serving()
    check_length(request, max_bytes := request.app[CONFIG].max_request_bytes)
    try:
        with request.app[UPLOADS].room_for(request):
            yield await receive_frame(request, max_bytes)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise HttpFault("protocol", f"the frame holds no submission: {error}") from None


async def _write_events(request: web.Request, stream: EventStream) -> web.StreamResponse:
    coordinator = request.app[COORDINATOR]
    response = await start_frames(request)
    writer = FrameWriter(response)
    async for batch in stream.batches():
        try:
            await writer.write(batch)
        except (ConnectionError, TimeoutError):
            # Whoever went away can fetch the results by id.
            response.force_close()
            return response
        finally:
            for outgoing in batch:
                outgoing.drop()
        for outgoing in batch:
            if isinstance(outgoing.event, Done | Failed):
                coordinator.ledger.mark_delivered(outgoing.event.id)
    await response.write_eof()
    return response


async def get_trace(request: web.Request) -> web.StreamResponse:
    """Send a finished request again, or 202 and its last progress while it is unfinished."""
    caller = request.app[AUTHENTICATOR].caller(request)
    coordinator = request.app[COORDINATOR]
    outgoing = coordinator.ledger.find(request.match_info["id"], caller.owner)
    if outgoing is None:
        raise _unknown(request)
    finished = isinstance(outgoing.event, Done | Failed)
    outgoing.hold()
    try:
        response = await start_frames(request, status=200 if finished else 202)
        await FrameWriter(response).write([outgoing])
    finally:
        outgoing.drop()
    await response.write_eof()
    if finished:
        coordinator.ledger.mark_delivered(request.match_info["id"])
    return response


async def delete_trace(request: web.Request) -> web.Response:
    """Cancel an unfinished request; forget a finished one."""
    caller = request.app[AUTHENTICATOR].caller(request)
    if not request.app[COORDINATOR].cancel(request.match_info["id"], caller.owner):
        raise _unknown(request)
    return web.Response(status=204)


def _unknown(request: web.Request) -> HttpFault:
    name = request.match_info["id"]
    return HttpFault("protocol", f"no trace {name} here: never sent, or forgotten", status=404)
