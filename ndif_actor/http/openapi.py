"""The OpenAPI 3.1 document, generated from the route table and the messages' own schemas."""

from __future__ import annotations

import http
import inspect
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from ndif_actor.http.frames import CONTENT_TYPE
from ndif_actor.http.routes import Route
from ndif_client.wire.messages import FaultReply

Document = dict[str, Any]

_FRAMES = (
    "A frame: 4 bytes NDIF, a version, a reserved byte, the number of buffers (2 bytes), the "
    "length of the header (4), the length of each buffer (8 each), all little-endian; then the "
    "header as msgpack (its schema is given here), then the buffers back to back."
)


def build_document(routes: Iterable[Route], title: str, version: str) -> Document:
    """Describe `routes` as OpenAPI."""
    routes = list(routes)
    types = [kind for route in routes for kind in (route.body, route.reply) if kind is not None]
    types.append(FaultReply)
    schemas, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    schema_of = {id(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    paths: Document = {}
    for route in routes:
        path = re.sub(r"{(\w+):[^}]*}", r"{\1}", route.path)
        operation = _operation(route, schema_of)
        paths.setdefault(path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, schema_of: dict[int, Document]) -> Document:
    operation: Document = {
        "operationId": route.handler.__name__,
        "summary": (inspect.getdoc(route.handler) or "").partition("\n")[0],
        "responses": _responses(route, schema_of),
        "security": [] if route.public else [{}, {"key": []}],
    }
    if "{id" in route.path:
        operation["parameters"] = [
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    if route.body is not None:
        content = _content(schema_of[id(route.body)], framed=route.framed != "nothing")
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _responses(route: Route, schema_of: dict[int, Document]) -> Document:
    if route.reply is None:
        responses: Document = {"204": {"description": "Done; nothing to say."}}
    else:
        framed = route.framed == "both"
        content = _content(schema_of[id(route.reply)], framed=framed)
        description = _FRAMES if framed else "OK"
        responses = {"200": {"description": description, "content": content}}
    fault = _content(schema_of[id(FaultReply)], framed=False)
    for status, reason in route.statuses.items():
        responses[str(status)] = {"description": reason}
        if status >= http.HTTPStatus.BAD_REQUEST:
            responses[str(status)]["content"] = fault
    if not route.public:
        responses["401"] = {"description": "no API key, or an unknown one", "content": fault}
    return responses


def _content(schema: Document, *, framed: bool) -> Document:
    return {CONTENT_TYPE if framed else "application/json": {"schema": schema}}
