"""The messages between a coordinator and the shards of its replica, each the header of one frame.

    shard -> coordinator   Hello, Loaded, LogLines, PassDone, ShardFailed
    coordinator -> shard   Load, RunPass, Settle, Forget, SwapOut, SwapIn, Stop

Every shard of a replica receives the same messages in the same order. Only `RunPass` is answered,
and only rank 0 sends values and tokens back; the others answer with an empty `PassDone`.

A trace comes and goes with one pass. A generation joins with its first pass and stays on the
shards until a `Forget`, even after it has failed; its KV cache lies in pages that the coordinator
hands out.

What a request keeps waits on the shards until a `Settle` says that the request has ended well; what
no `Settle` has named when the next `RunPass` comes is gone.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ndif_client.wire.frames import FrameLimits
from ndif_client.wire.graph import Graph, HookPoint
from ndif_client.wire.messages import Decoding, Fault, HeldSpec, SavedTensor, SavedTuple

#: How a pass lays out its groups: end to end in one row, or one request padded to a rectangle.
Layout = Literal["packed", "dense"]


class Hello(msgspec.Struct, frozen=True, tag="hello", kw_only=True):
    """A shard presents itself; the link has already checked the shared secret."""

    rank: int
    world_size: int
    host: str
    pid: int


class Load(msgspec.Struct, frozen=True, tag="load", kw_only=True):
    """Load this slice of the model and join the replica's torch.distributed group.

    `folder` is a path every shard can read. `master_port` is 0 where the launcher's own
    rendezvous (MASTER_ADDR and MASTER_PORT) is to be used. `cache_bytes` is for this rank's KV
    cache; None for a share of the memory that is free.
    """

    folder: str
    dtype: str
    cache_bytes: int | None = None
    device: Literal["cpu", "cuda"]
    master_addr: str
    master_port: int
    group_timeout_s: float


class Loaded(msgspec.Struct, frozen=True, tag="loaded", kw_only=True):
    """The weights are in place. `unpackable` says why requests can't share a forward, if so.

    `cache_pages` pages of `page_tokens` tokens each make up this rank's KV cache; 0 pages if the
    model can't use one. The replica has as many as the rank with the fewest. `withheld` are hook
    points that it can't offer, by the reason why; the same on every rank.
    """

    rank: int
    device: str
    load_s: float
    parameter_bytes: int
    unpackable: str | None = None
    cache_pages: int = 0
    page_tokens: int = 1
    withheld: dict[str, list[HookPoint]] = {}


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """A request that joins: token ids per invoke and prompt, and the graph to run on them.

    `Constant` nodes of the graph point into the buffers of the frame of the `RunPass`. Rows of
    equal prompts may be computed once for all groups of equal `sharing`.

    Attributes:
        decoding: how a generation chooses tokens, with `eos`, `bad_words` and `logit_bias` as ids;
            None for a trace.
        cached: for each sequence of a generation, the pages of the KV cache that already hold the
            beginning of its prompt; all of them are full, and none holds its last token.
        decoder: what a decoder beside an encoder reads, as `invokes`; of other models empty.
        scope: whose held values it uses and keeps.
        held: what the values are that it uses, by name.
    """

    request: str
    invokes: list[list[list[int]]]
    graph: Graph
    sharing: int
    decoding: Decoding | None = None
    cached: list[list[int]] = []
    decoder: list[list[list[int]]] = []
    scope: str = ""
    held: dict[str, HeldSpec] = {}


class Feed(msgspec.Struct, frozen=True):
    """One sequence's part of a pass.

    Attributes:
        count: how many of its next tokens are fed; 0 if it sits this pass out.
        pages: added to its page table, whatever they held before.
        token: what is fed instead of its last sampled token, for a sequence that has ended while
            others of its group go on.
    """

    count: int
    pages: list[int] = []
    token: int | None = None


class Part(msgspec.Struct, frozen=True):
    """A generation's part of a pass; `feeds` has an entry for each of its sequences."""

    request: str
    feeds: list[Feed]


class RunPass(msgspec.Struct, frozen=True, tag="run", kw_only=True):
    """One forward: which groups join it, and which generations go on, the new ones included.

    A generation samples a token for each sequence that is fed its last known token.
    """

    sequence: Annotated[int, msgspec.Meta(ge=1)]
    layout: Layout
    groups: list[Group]
    parts: list[Part] = []


class Dropped(msgspec.Struct, frozen=True):
    """Held values that nobody needs any more; all of a scope where `names` is None."""

    scope: str
    names: list[str] | None = None


class Settle(msgspec.Struct, frozen=True, tag="settle"):
    """What the requests `kept` have kept is held from now on; then `dropped` goes."""

    kept: list[str]
    dropped: list[Dropped]


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """These generations are over, whether they know it or not; their pages are free."""

    requests: list[str]


class SwapOut(msgspec.Struct, frozen=True, tag="swap_out"):
    """Move a generation's KV cache to the host's memory; its pages are free after this."""

    request: str


class SwapIn(msgspec.Struct, frozen=True, tag="swap_in"):
    """Move a generation's KV cache back, into these pages of each sequence."""

    request: str
    pages: list[list[int]]


class GroupResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one group made in a pass, or why it failed; bytes are buffers of the same frame.

    `tokens` has an entry for each sequence of a generation: the sampled token, or None; if
    `has_ended`, its graph wants them to be the last. `kept` are the names it has kept so far.
    """

    request: str
    tensors: list[SavedTensor] = []
    tuples: list[SavedTuple] = []
    tokens: list[int | None] = []
    has_ended: bool = False
    kept: list[str] = []
    fault: Fault | None = None


class LogLine(msgspec.Struct, frozen=True):
    """A line that node number `node` of a request has written at a step."""

    request: str
    node: int
    step: int
    text: str


class LogLines(msgspec.Struct, frozen=True, tag="log"):
    """Lines written in the pass that runs, in order; rank 0 alone tells them."""

    lines: list[LogLine]


class PassDone(msgspec.Struct, frozen=True, tag="done", kw_only=True):
    """A forward is over. `results` is filled by rank 0 alone."""

    rank: int
    sequence: int
    forward_s: float
    results: list[GroupResult] = []


class ShardFailed(msgspec.Struct, frozen=True, tag="failed", kw_only=True):
    """The shard can't go on (load error, lost peer, out of memory) and is about to exit."""

    rank: int
    message: str


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Leave the group and exit cleanly."""


ToShard = Load | RunPass | Settle | Forget | SwapOut | SwapIn | Stop
FromShard = Hello | Loaded | LogLines | PassDone | ShardFailed

#: What these links accept: both sides are this program, and clients' limits have held before.
LINK_LIMITS = FrameLimits(
    max_header_bytes=1 << 30,
    max_buffers=0xFFFF,
    max_buffer_bytes=1 << 40,
    max_total_bytes=1 << 40,
)
