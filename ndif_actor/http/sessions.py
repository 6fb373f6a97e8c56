"""The values that are held for a session: what they are, and dropping them."""

from __future__ import annotations

import msgspec
from aiohttp import web

from ndif_actor.http.body import receive_json
from ndif_actor.http.faults import HttpFault
from ndif_actor.http.keys import AUTHENTICATOR, COORDINATOR
from ndif_client.wire.messages import DropRequest, HeldValues


async def get_session(request: web.Request) -> web.Response:
    """List what is held for a session of the caller's."""
    user = request.app[AUTHENTICATOR].caller(request).user
    return _json(request.app[COORDINATOR].sessions.values(user, request.match_info["id"]))


async def post_drop(request: web.Request) -> web.Response:
    """Let go of held values; say which of them there were."""
    user = request.app[AUTHENTICATOR].caller(request).user
    body = await receive_json(request, DropRequest)
    sessions = request.app[COORDINATOR].sessions
    return _json(sessions.drop(user, request.match_info["id"], body.names))


async def delete_session(request: web.Request) -> web.Response:
    """Let go of all that is held for a session."""
    user = request.app[AUTHENTICATOR].caller(request).user
    if not request.app[COORDINATOR].sessions.drop_all(user, request.match_info["id"]):
        message = f"nothing is held for session {request.match_info['id']}"
        raise HttpFault("protocol", message, status=404)
    return web.Response(status=204)


def _json(values: HeldValues) -> web.Response:
    return web.Response(body=msgspec.json.encode(values), content_type="application/json")
