"""The aiohttp application: the route table, what its handlers find, and one listener."""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec
import structlog
from aiohttp import web

from ndif_actor.config import ServerConfig
from ndif_actor.coordinator.coordinator import Coordinator
from ndif_actor.errors import LaunchError
from ndif_actor.http.auth import Authenticator
from ndif_actor.http.body import Uploads
from ndif_actor.http.faults import fault_middleware
from ndif_actor.http.keys import AUTHENTICATOR, CONFIG, COORDINATOR, OPENAPI, UPLOADS
from ndif_actor.http.openapi import build_document
from ndif_actor.http.routes import ROUTES
from ndif_actor.http.status import DISTRIBUTION, version

_log = structlog.get_logger(__name__)

_LOOPBACK = frozenset({"localhost", "::1"})


def make_application(config: ServerConfig, coordinator: Coordinator) -> web.Application:
    """Build the application.

    Raises:
        ConfigError: the file of API keys can't be read.
    """
    application = web.Application(middlewares=[fault_middleware])
    application[CONFIG] = config
    application[COORDINATOR] = coordinator
    key_file = Path(config.api_key_file) if config.api_key_file else None
    application[AUTHENTICATOR] = Authenticator.from_file(key_file)
    application[UPLOADS] = Uploads(config.max_queued_bytes)
    document = build_document(ROUTES, DISTRIBUTION, version().version)
    application[OPENAPI] = msgspec.json.encode(document)
    for route in ROUTES:
        application.router.add_route(route.method, route.path, route.handler)
    if not application[AUTHENTICATOR].required and not is_loopback(config.host):
        _log.warning(
            "ANYBODY who can reach this address can use this server: it has no API keys",
            host=config.host,
            fix="give --api-key-file, or --host 127.0.0.1",
        )
    return application


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    return host in _LOOPBACK or host.startswith("127.")


def bind(host: str, port: int) -> socket.socket:
    """Take the listening address, before anything slow begins.

    Args:
        host: name or address.
        port: 0 for any free one.

    Raises:
        LaunchError: it can't be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise LaunchError(f"can't listen on {host}:{port}: {error.strerror or error}") from None
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the base URL that clients use."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
