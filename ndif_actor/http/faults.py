"""Faults as HTTP replies: one JSON body for every status of 400 or more."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec
import structlog
from aiohttp import web

from ndif_actor.errors import RequestError
from ndif_client.wire.messages import Fault, FaultReply

_log = structlog.get_logger(__name__)

Kind = Literal["limit", "busy", "unavailable", "auth", "protocol", "internal"]

_STATUS: dict[str, int] = {
    "graph": 400,
    "execution": 400,
    "limit": 413,
    "busy": 429,
    "unavailable": 503,
    "cancelled": 409,
    "auth": 401,
    "protocol": 400,
    "internal": 500,
}

#: aiohttp's own refusals (no such route, wrong method, too large) in our words.
_KIND_OF_STATUS: dict[int, Kind] = {401: "auth", 413: "limit", 429: "busy", 503: "unavailable"}


class HttpFault(Exception):
    """Raised by a handler to answer with a fault."""

    def __init__(
        self,
        kind: Kind,
        message: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.fault = Fault(kind=kind, message=message, retry_after=retry_after_s)
        self.status = status or _STATUS[kind]


def fault_response(fault: Fault, status: int) -> web.Response:
    """Return the reply for `fault`, with `Retry-After` where it names a time."""
    headers = {}
    if fault.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(fault.retry_after))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(
        status=status,
        body=msgspec.json.encode(FaultReply(error=fault)),
        content_type="application/json",
        headers=headers,
    )


@web.middleware
async def fault_middleware(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Turn every refusal and every crash of a handler into a `FaultReply`."""
    try:
        return await handler(request)
    except HttpFault as error:
        response = fault_response(error.fault, error.status)
    except RequestError as error:
        response = fault_response(error.fault, _STATUS[error.fault.kind])
    except web.HTTPException as error:
        if error.status < 400:
            raise
        kind = _KIND_OF_STATUS.get(error.status, "protocol")
        message = f"{request.method} {request.path}: {error.reason}"
        response = fault_response(Fault(kind=kind, message=message), error.status)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
    except ConnectionError:
        raise  # the client is gone; there is nobody to answer
    except Exception as error:
        # Details stay in the log: a stranger learns only where to look.
        _log.exception("handler failed", method=request.method, path=request.path)
        fault = Fault(kind="internal", message=f"internal error ({type(error).__name__}); see log")
        response = fault_response(fault, 500)
    if request.body_exists and not request.content.at_eof():
        # The rest of an unread body is not worth receiving.
        response.force_close()
    return response
