"""Every endpoint, once: the application and the OpenAPI document are both built from this table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec
from aiohttp import web

from ndif_actor.http import models, sessions, status, traces
from ndif_client.wire.messages import (
    DetokenizeRequest,
    Done,
    DropRequest,
    Event,
    Explanations,
    Failed,
    HeldValues,
    ModelList,
    ModelTree,
    Submission,
    TokenizeReply,
    TokenizeRequest,
)

#: Of an endpoint's body and reply.
Framed = Literal["nothing", "body", "both"]


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint.

    Attributes:
        method, path: where; `{id:.+}` in a path takes slashes, as model ids have them.
        handler: its docstring is the summary in the document.
        body: what is sent, if anything.
        reply: what comes back with status 200, or None for 204.
        framed: which of body and reply are frames with these headers (msgpack), not JSON.
        statuses: other statuses it answers with, and when.
        public: needs no API key.
    """

    method: str
    path: str
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    body: Any = None
    reply: Any = None
    framed: Framed = "nothing"
    statuses: dict[int, str] = {}
    public: bool = False


_BUSY = {429: "the queue is full", 503: "not ready, or draining"}
_BODY = {400: "malformed", 408: "the body came too slowly", 413: "too large"}

ROUTES = (
    Route(
        method="POST",
        path="/v1/traces",
        handler=traces.post_traces,
        body=Submission,
        reply=Event,
        framed="both",
        statuses={**_BODY, 409: "an id is in use", 411: "no Content-Length", **_BUSY},
    ),
    Route(
        method="GET",
        path="/v1/traces/{id}",
        handler=traces.get_trace,
        reply=Done | Failed,
        framed="both",
        statuses={202: "unfinished; the frame tells its last progress", 404: "unknown id"},
    ),
    Route(
        method="DELETE",
        path="/v1/traces/{id}",
        handler=traces.delete_trace,
        statuses={404: "unknown id"},
    ),
    Route(
        method="POST",
        path="/v1/explain",
        handler=traces.post_explain,
        body=Submission,
        reply=Explanations,
        framed="body",
        statuses={**_BODY, 411: "no Content-Length", **_BUSY},
    ),
    Route(method="GET", path="/v1/sessions/{id}", handler=sessions.get_session, reply=HeldValues),
    Route(
        method="POST",
        path="/v1/sessions/{id}/drop",
        handler=sessions.post_drop,
        body=DropRequest,
        reply=HeldValues,
        statuses=_BODY,
    ),
    Route(
        method="DELETE",
        path="/v1/sessions/{id}",
        handler=sessions.delete_session,
        statuses={404: "nothing is held for it"},
    ),
    Route(method="GET", path="/v1/models", handler=models.list_models, reply=ModelList),
    Route(
        method="POST",
        path="/v1/models/{id:.+}/tokenize",
        handler=models.tokenize,
        body=TokenizeRequest,
        reply=TokenizeReply,
        statuses={**_BODY, 404: "unknown model", 503: "still loading"},
    ),
    Route(
        method="POST",
        path="/v1/models/{id:.+}/detokenize",
        handler=models.detokenize,
        body=DetokenizeRequest,
        reply=TokenizeReply,
        statuses={**_BODY, 404: "unknown model", 503: "still loading"},
    ),
    Route(
        method="GET",
        path="/v1/models/{id:.+}",
        handler=models.get_model,
        reply=ModelTree,
        statuses={404: "unknown model", 503: "still loading"},
    ),
    Route(
        method="GET", path="/health", handler=status.get_health, reply=status.Health, public=True
    ),
    Route(
        method="GET",
        path="/ready",
        handler=status.get_ready,
        reply=status.Readiness,
        statuses={503: "not ready; the body names each check"},
        public=True,
    ),
    Route(
        method="GET",
        path="/version",
        handler=status.get_version,
        reply=status.Version,
        public=True,
    ),
    Route(method="GET", path="/openapi.json", handler=status.get_openapi, reply=Any, public=True),
)
