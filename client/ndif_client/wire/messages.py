"""The messages between client and coordinator, each the header of one frame.

    POST /v1/traces        body: one frame, header `Submission`;
                           reply: a stream of frames, header `Event`, for all its requests
    GET  /v1/traces/{id}   reply: one frame, header `Done` or `Failed` (202 while unfinished)
    DELETE /v1/traces/{id} cancels
    GET  /v1/models/{id}   reply: `ModelTree` as JSON
    POST /v1/models/{id}/tokenize, /detokenize   JSON both ways

All requests of one `Submission` are admitted together, so they can share a forward.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ndif_client.wire.graph import MAX_INVOKES, Graph, Invoke, Path, Port, Source
from ndif_client.wire.tensors import TensorSpec

#: The version of these messages; a server refuses another one by name.
PROTOCOL = 1

MAX_REQUESTS = 1024

RequestId = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_-]{8,64}\Z")]


# ---------------------------------------------------------------- client -> coordinator


class TraceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One trace: prompts and the graph to run on them. `id` is made by the client (a UUID)."""

    id: RequestId
    model: Path
    invokes: Annotated[list[Invoke], msgspec.Meta(min_length=1, max_length=MAX_INVOKES)]
    graph: Graph


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """Everything sent in one POST. `Constant` nodes point into the buffers of its frame."""

    requests: Annotated[list[TraceRequest], msgspec.Meta(min_length=1, max_length=MAX_REQUESTS)]
    protocol: int = PROTOCOL


# ---------------------------------------------------------------- coordinator -> client


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request failed, in words its author can act on.

    `kind` names the exception the client raises; `node` and `source` say which line is meant,
    `other_source` a second line that it conflicts with.
    """

    kind: Literal[
        "graph",  # the graph can never run: order, shapes, unknown names, ops
        "execution",  # an operation of the graph failed while it ran
        "limit",  # larger than this server admits
        "busy",  # the queue is full; retry after `retry_after` seconds
        "unavailable",  # the replica died or is not ready
        "cancelled",
        "auth",
        "protocol",  # the message itself was malformed
        "internal",
    ]
    message: str
    node: int | None = None
    hook: str | None = None
    source: Source | None = None
    other_source: Source | None = None
    retry_after: float | None = None


class Queued(msgspec.Struct, frozen=True, tag="queued"):
    """Admitted, and `position` requests will start before this one."""

    id: str
    position: int


class Running(msgspec.Struct, frozen=True, tag="running"):
    """The forward that carries this request has started, with `groups` requests in it."""

    id: str
    groups: int


class PromptTokens(msgspec.Struct, frozen=True):
    """How the server tokenised one prompt: ids, and each id decoded by itself."""

    ids: list[int]
    tokens: list[str]


class SavedTensor(msgspec.Struct, frozen=True):
    """One saved value; its bytes are a buffer of the same frame."""

    node: int
    name: str | None
    tensor: TensorSpec


class SavedTuple(msgspec.Struct, frozen=True):
    """A saved value of several tensors, such as the result of `topk` as a whole."""

    node: int
    name: str | None
    fields: list[str]
    items: list[TensorSpec]


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a request cost and whom it shared with; times in seconds.

    `forward` numbers the forwards of this replica from 1: requests with the same number shared
    one. `groups` and `tokens` are what that forward carried in all.
    """

    queue_s: float
    forward_s: float
    forward: int
    groups: int
    tokens: int
    numerics: Literal["fast", "solo"] = "fast"


class Done(msgspec.Struct, frozen=True, tag="done", kw_only=True):
    """The saved values of a request and what it cost."""

    id: str
    prompts: list[list[PromptTokens]]
    tensors: list[SavedTensor]
    tuples: list[SavedTuple] = []
    statistics: Statistics


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The request ended without a result."""

    id: str
    fault: Fault


Event = Queued | Running | Done | Failed


# ---------------------------------------------------------------- the model tree


class HookInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One hook point of a module.

    `shape` is symbolic: integers, "batch", "sequence", or "batch*sequence". `order` says when it
    fires within a forward: a value can reach only hook points of the same or a higher order.
    """

    port: Port
    leaf: str = ""
    call: int = 0
    shape: list[int | str]
    dtype: str
    order: int


class ParameterInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """A parameter or buffer of a module, as its whole, unsharded self."""

    name: str
    shape: list[int]
    dtype: str


class ModuleInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A module: its name in its parent, its class, and what can be touched in it."""

    name: str
    kind: str
    #: what torch prints between the parentheses, e.g. "in_features=576, out_features=1536"
    extra: str = ""
    hooks: list[HookInfo] = []
    parameters: list[ParameterInfo] = []
    children: list[ModuleInfo] = []


class ModelTree(msgspec.Struct, frozen=True, kw_only=True):
    """A served model as a client may browse it without weights."""

    id: str
    kind: str
    dtype: str
    device: str
    tensor_parallel: int
    #: whether requests share forwards; if not, `unpackable` says why each runs alone
    packed: bool
    unpackable: str | None = None
    num_layers: int
    hidden_size: int
    vocab_size: int
    root: ModuleInfo


class ModelSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    dtype: str
    tensor_parallel: int
    packed: bool
    ready: bool


class ModelList(msgspec.Struct, frozen=True):
    """The reply of `GET /v1/models`."""

    data: list[ModelSummary]
    object: Literal["list"] = "list"


class TokenizeRequest(msgspec.Struct, frozen=True):
    """Body of `POST /v1/models/{id}/tokenize`."""

    text: Annotated[str, msgspec.Meta(max_length=4 << 20)]


class DetokenizeRequest(msgspec.Struct, frozen=True):
    """Body of `POST /v1/models/{id}/detokenize`: the ids are decoded together and one by one."""

    ids: Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(max_length=1 << 20)]


class TokenizeReply(msgspec.Struct, frozen=True):
    """Reply of both: ids, each id's own text, and the text of them together."""

    ids: list[int]
    tokens: list[str]
    text: str


class FaultReply(msgspec.Struct, frozen=True):
    """JSON body of every reply with a status of 400 or more."""

    error: Fault
