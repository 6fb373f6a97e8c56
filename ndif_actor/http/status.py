"""For operators and load balancers: is it alive, does it serve, what is it."""

from __future__ import annotations

import platform
from importlib import metadata

import msgspec
from aiohttp import web

from ndif_actor.http.keys import COORDINATOR, OPENAPI
from ndif_client.wire import frames, messages

DISTRIBUTION = "ndif-actor"


class Health(msgspec.Struct, frozen=True):
    """The reply of `GET /health`: this process answers."""

    status: str = "ok"


class Readiness(msgspec.Struct, frozen=True):
    """The reply of `GET /ready`: each check is "ok" or says what is missing."""

    ready: bool
    checks: dict[str, str]


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """The reply of `GET /version`."""

    version: str
    protocol: int
    frame_version: int
    python: str


def version() -> Version:
    """Return what this process is."""
    return Version(
        version=metadata.version(DISTRIBUTION),
        protocol=messages.PROTOCOL,
        frame_version=frames.VERSION,
        python=platform.python_version(),
    )


async def get_health(_: web.Request) -> web.Response:
    """Answer, which is all there is to it."""
    return _json(Health())


async def get_ready(request: web.Request) -> web.Response:
    """Say whether requests are taken: 200, or 503 naming each check that fails."""
    checks = request.app[COORDINATOR].checks()
    ready = all(state == "ok" for state in checks.values())
    response = _json(Readiness(ready, checks))
    response.set_status(200 if ready else 503)
    return response


async def get_version(_: web.Request) -> web.Response:
    """Say which versions this server speaks."""
    return _json(version())


async def get_openapi(request: web.Request) -> web.Response:
    """Send the OpenAPI document."""
    return web.Response(body=request.app[OPENAPI], content_type="application/json")


def _json(message: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(message), content_type="application/json")
