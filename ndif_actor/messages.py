"""The messages between a coordinator and the shards of its replica, each the header of one frame.

    shard -> coordinator   Hello, Loaded, PassDone, ShardFailed
    coordinator -> shard   Load, RunPass, Stop

Every shard of a replica receives the same `RunPass` messages in the same order. Only rank 0 sends
saved values back; the others answer with an empty `PassDone`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ndif_client.wire.frames import FrameLimits
from ndif_client.wire.graph import Graph
from ndif_client.wire.messages import Fault, SavedTensor, SavedTuple

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
    rendezvous (MASTER_ADDR and MASTER_PORT) is to be used.
    """

    folder: str
    dtype: str
    device: Literal["cpu", "cuda"]
    master_addr: str
    master_port: int
    group_timeout_s: float


class Loaded(msgspec.Struct, frozen=True, tag="loaded", kw_only=True):
    """The weights are in place. `unpackable` says why requests can't share a forward, if so."""

    rank: int
    device: str
    load_s: float
    parameter_bytes: int
    unpackable: str | None = None


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of one request: token ids per invoke and prompt, and the graph to run on them.

    `Constant` nodes of the graph point into the buffers of the frame of the `RunPass`.
    """

    request: str
    invokes: list[list[list[int]]]
    graph: Graph


class RunPass(msgspec.Struct, frozen=True, tag="run", kw_only=True):
    """One forward: which groups share it, and how their rows are laid out."""

    sequence: Annotated[int, msgspec.Meta(ge=1)]
    layout: Layout
    groups: list[Group]


class GroupResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one group saved, or why it failed; bytes are buffers of the same frame."""

    request: str
    tensors: list[SavedTensor] = []
    tuples: list[SavedTuple] = []
    fault: Fault | None = None


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


ToShard = Load | RunPass | Stop
FromShard = Hello | Loaded | PassDone | ShardFailed

#: What these links accept: both sides are this program, and clients' limits have held before.
LINK_LIMITS = FrameLimits(
    max_header_bytes=1 << 30,
    max_buffers=0xFFFF,
    max_buffer_bytes=1 << 40,
    max_total_bytes=1 << 40,
)
