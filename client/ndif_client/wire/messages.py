"""The messages between client and coordinator, each the header of one frame.

    POST /v1/traces        body: one frame, header `Submission`;
                           reply: a stream of frames, header `Event`, for all its requests
    GET  /v1/traces/{id}   reply: one frame, header `Done` or `Failed` (202 while unfinished)
    DELETE /v1/traces/{id} cancels
    GET  /v1/models/{id}   reply: `ModelTree` as JSON
    POST /v1/models/{id}/tokenize, /detokenize   JSON both ways
    POST /v1/explain       body as of /v1/traces; reply: `Explanations` as JSON; nothing runs
    GET  /v1/sessions/{id}       reply: `HeldValues` as JSON
    POST /v1/sessions/{id}/drop  body: `DropRequest` as JSON; reply: `HeldValues`, those dropped
    DELETE /v1/sessions/{id}     drops all that is held for it

All requests of one `Submission` are admitted together, so they can share a forward.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ndif_client.wire.graph import MAX_INVOKES, Graph, HeldName, Invoke, Path, Port, Source
from ndif_client.wire.tensors import TensorSpec

#: The version of these messages; a server refuses another one by name.
PROTOCOL = 2

MAX_REQUESTS = 1024

#: The HTTP header with a client's own name for its session; tells users without a key apart, for
#: fair turns only.
SESSION_HEADER = "X-Ndif-Session"

#: Requests that one may come after.
MAX_AFTER = 256

RequestId = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_-]{8,64}\Z")]

#: Made by the client, at random: whoever knows it, and is the same user, shares what is held.
SessionId = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_-]{8,64}\Z")]


# ---------------------------------------------------------------- client -> coordinator


Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
TokenId = Annotated[int, msgspec.Meta(ge=0)]
#: A text, or the ids of its tokens.
Words = (
    Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    | Annotated[list[TokenId], msgspec.Meta(min_length=1, max_length=4096)]
)


class Decoding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are chosen after each prompt, and when that ends.

    Attributes:
        max_new_tokens: of each sequence.
        min_new_tokens: before them, no end-of-sequence token is chosen.
        temperature: 0 takes the most likely token; above it, tokens are sampled.
        top_k, top_p, min_p: what to sample from; None leaves all in.
        repetition_penalty: divides (or multiplies, if negative) the logits of tokens seen before.
        seed: of the sampling noise; the same seed gives the same tokens, whoever shares the batch.
        stop: texts that end a sequence when they appear in what it has generated.
        eos: ids that end a sequence; None for the model's own, [] for none.
        bad_words: what must not be generated.
        logit_bias: added to the logits of these token ids.
    """

    max_new_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    min_new_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    temperature: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 0.0
    top_k: Annotated[int, msgspec.Meta(ge=1)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)] = 0
    stop: Annotated[
        list[Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]],
        msgspec.Meta(max_length=64),
    ] = []
    eos: Annotated[list[TokenId], msgspec.Meta(max_length=64)] | None = None
    bad_words: Annotated[list[Words], msgspec.Meta(max_length=1024)] = []
    logit_bias: Annotated[dict[TokenId, float], msgspec.Meta(max_length=4096)] = {}


#: How far a result may depend on its neighbours in the batch: "fast" only by rounding, within
#: the stated tolerances; "solo" not at all, because the request has every forward to itself.
Numerics = Literal["fast", "solo"]


class TraceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One trace: prompts and the graph to run on them. `id` is made by the client (a UUID).

    With `decoding` it is a generation: the model goes on after the prompts, step after step.

    Attributes:
        invokes: none where the graph needs no forward.
        session: whose held values it uses and keeps, where it does.
        after: earlier requests of the same user; it runs when all of them have ended well, and
            fails when one has not.
    """

    id: RequestId
    model: Path
    invokes: Annotated[list[Invoke], msgspec.Meta(max_length=MAX_INVOKES)]
    graph: Graph
    decoding: Decoding | None = None
    numerics: Numerics = "fast"
    session: SessionId | None = None
    after: Annotated[list[RequestId], msgspec.Meta(max_length=MAX_AFTER)] = []


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


class Generated(msgspec.Struct, frozen=True, tag="generated"):
    """The tokens one step of a generation has made.

    `sequences[i]`, counted over all prompts of all invokes, got token `tokens[i]`, and `texts[i]`
    is what its text has grown by (empty while a character is incomplete).
    """

    id: str
    step: int
    sequences: list[int]
    tokens: list[int]
    texts: list[str]


class Logged(msgspec.Struct, frozen=True, tag="logged"):
    """A line that node number `node` has written at a step, while the request runs."""

    id: str
    node: int
    step: int
    text: str


class Completion(msgspec.Struct, frozen=True):
    """What was generated after one prompt; `ids` ends with the end-of-sequence token, if any.

    `text` is the text of `ids` without special tokens; a text of `stop` that ended it, and what
    follows, is cut off. Of a request that failed it has what was generated before. `finish` is
    "condition" where the request's own graph has ended it.
    """

    ids: list[int]
    tokens: list[str]
    text: str
    finish: Literal["length", "eos", "stop", "condition", "failed"]


class PromptTokens(msgspec.Struct, frozen=True):
    """How the server tokenised one prompt: ids, and each id decoded by itself."""

    ids: list[int]
    tokens: list[str]


class SavedTensor(msgspec.Struct, frozen=True):
    """One saved value, of one step; its bytes are a buffer of the same frame."""

    node: int
    name: str | None
    tensor: TensorSpec
    step: int = 0


class SavedTuple(msgspec.Struct, frozen=True):
    """A saved value of several tensors, such as the result of `topk` as a whole."""

    node: int
    name: str | None
    fields: list[str]
    items: list[TensorSpec]
    step: int = 0


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a request cost and whom it shared with; times in seconds.

    `forward` numbers the forwards of this replica from 1: requests with the same number shared
    one. `groups` and `tokens` are what that forward carried in all. Of a generation they tell
    about its first forward, `forward_s` about all of its `forwards` together.

    Attributes:
        first_token_s: from arrival to the first generated token.
        cached_tokens: of the prompts, taken from the KV cache of earlier requests.
    """

    queue_s: float
    forward_s: float
    forward: int
    groups: int
    tokens: int
    numerics: Numerics = "fast"
    forwards: int = 1
    first_token_s: float | None = None
    cached_tokens: int = 0


class Done(msgspec.Struct, frozen=True, tag="done", kw_only=True):
    """The saved values of a request and what it cost."""

    id: str
    prompts: list[list[PromptTokens]]
    tensors: list[SavedTensor]
    tuples: list[SavedTuple] = []
    statistics: Statistics
    completions: list[list[Completion]] = []


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The request ended early; `partial` has what it had saved until then, if anything."""

    id: str
    fault: Fault
    partial: Done | None = None


Event = Queued | Running | Generated | Logged | Done | Failed


class RowsAtDepth(msgspec.Struct, frozen=True):
    """Rows of the packed batch from one boundary of the decoder layers to the next.

    `before` is the number of the layer that the boundary lies before: 0 for the first, the number
    of layers for what follows the last.
    """

    before: int
    rows: int


class ValueInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """Shape and dtype of a value; `items` are those of a tuple of tensors instead."""

    shape: list[int] = []
    dtype: str = ""
    items: list[ValueInfo] | None = None


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What a request would cost, alone, without running it.

    Attributes:
        tokens: rows it brings to its first forward.
        value_bytes, saved_bytes: memory of its values and of its result.
        flops: floating-point operations of its own nodes.
        depth: how many rows it has from each boundary on: fewer after an early leave, more after
            a late fork.
        row_layers: rows x layers that it computes, and that it would without either.
        notes: the same in words, a line each.
        values: shape and dtype of each node's value; None for what has none.
    """

    id: str
    tokens: int
    value_bytes: int
    saved_bytes: int
    flops: int
    depth: list[RowsAtDepth]
    row_layers: tuple[int, int]
    notes: list[str]
    values: list[ValueInfo | None] = []


class Explanations(msgspec.Struct, frozen=True):
    """JSON reply of `POST /v1/explain`, whose body is that of `POST /v1/traces`."""

    requests: list[Explanation]


# ---------------------------------------------------------------- held values


#: What a held value is: a tensor, or a tuple of tensors.
HeldSpec = TensorSpec | list[TensorSpec]


class HeldValues(msgspec.Struct, frozen=True):
    """Values that the server holds for a session, or did so: what each is, by name."""

    held: dict[str, HeldSpec]


class DropRequest(msgspec.Struct, frozen=True):
    """Body of `POST /v1/sessions/{id}/drop`; names of nothing are passed over."""

    names: Annotated[list[HeldName], msgspec.Meta(max_length=1 << 16)]


# ---------------------------------------------------------------- the model tree


class HookInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One hook point of a module, or of an operation inside of its forward.

    `shape` is symbolic: integers, "batch", "sequence", or "batch*sequence". `order` says when it
    fires within a forward: a value can reach only hook points of the same or a higher order.
    """

    port: Port
    leaf: str = ""
    call: int = 0
    operation: str = ""
    shape: list[int | str]
    dtype: str
    order: int


class OperationInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One operation inside of a forward: its name, and the line of the source it stands in.

    Lines are counted from 0, orders of its hook points from the module's own first one.
    """

    name: str
    line: int
    hooks: list[HookInfo] = []
    #: why other tensors of it can't be touched, if there are any
    withheld: str = ""


class ForwardInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is inside of a forward, or why nothing of it can be touched."""

    source: str = ""
    operations: list[OperationInfo] = []
    refusal: str = ""


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
    #: position of its forward in `ModelTree.forwards`, and what its orders are counted from
    forward: int | None = None
    first_order: int = 0
    parameters: list[ParameterInfo] = []
    children: list[ModuleInfo] = []
    #: names that mean the same in every family ("attn", "layers"), and the modules' paths from here
    aliases: dict[str, str] = {}
    #: of a layer: the leaves of its input and of its output that are the residual stream
    residual: tuple[str, str] | None = None


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
    #: what is inside of the modules' forwards, once for all modules where it is the same
    forwards: list[ForwardInfo] = []


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
