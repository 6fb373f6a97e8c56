"""The served model: its summary, its tree, its tokenizer."""

from __future__ import annotations

import msgspec
from aiohttp import web

from ndif_actor.http.body import receive_json
from ndif_actor.http.faults import HttpFault
from ndif_actor.http.keys import AUTHENTICATOR, COORDINATOR
from ndif_client.wire.messages import DetokenizeRequest, ModelList, TokenizeRequest


async def list_models(request: web.Request) -> web.Response:
    """List the models, which is the one."""
    request.app[AUTHENTICATOR].caller(request)
    return _json(ModelList(data=[request.app[COORDINATOR].summary()]))


async def get_model(request: web.Request) -> web.Response:
    """Send the model tree."""
    _check_model(request)
    return web.Response(body=request.app[COORDINATOR].tree_json(), content_type="application/json")


async def tokenize(request: web.Request) -> web.Response:
    """Turn a text into token ids."""
    _check_model(request)
    body = await receive_json(request, TokenizeRequest)
    return _json(await request.app[COORDINATOR].admission.tokenize(body.text))


async def detokenize(request: web.Request) -> web.Response:
    """Turn token ids into text."""
    _check_model(request)
    body = await receive_json(request, DetokenizeRequest)
    return _json(await request.app[COORDINATOR].admission.detokenize(body.ids))


def _check_model(request: web.Request) -> None:
    request.app[AUTHENTICATOR].caller(request)
    coordinator = request.app[COORDINATOR]
    if request.match_info["id"] != coordinator.model_id:
        message = f"no model {request.match_info['id']!r} here, but {coordinator.model_id!r}"
        raise HttpFault("protocol", message, status=404)
    coordinator.summary()  # raises while the model is still loading


def _json(message: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(message), content_type="application/json")
