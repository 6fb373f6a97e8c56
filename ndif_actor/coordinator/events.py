"""What the scheduler is told and what it answers: small frozen records, nothing else."""

from __future__ import annotations

from typing import Literal

import msgspec

from ndif_actor.messages import Layout


class Ticket(msgspec.Struct, frozen=True):
    """An admitted request as the scheduler sees it: an id and what it costs.

    Attributes:
        tokens: rows of the packed batch that it takes.
        nbytes: memory that its values take at their peak.
        tensors: how many values it saves.
    """

    request: str
    tokens: int
    nbytes: int = 0
    tensors: int = 0


class Budget(msgspec.Struct, frozen=True):
    """What one forward may carry; a request that is larger by itself runs alone."""

    tokens: int
    nbytes: int = 4 << 30
    #: a frame numbers its buffers with 16 bits, and a saved tuple takes several
    tensors: int = 16_384

    def fits(self, ticket: Ticket) -> bool:
        return (
            ticket.tokens <= self.tokens
            and ticket.nbytes <= self.nbytes
            and ticket.tensors <= self.tensors
        )

    def minus(self, ticket: Ticket) -> Budget:
        return Budget(
            self.tokens - ticket.tokens,
            self.nbytes - ticket.nbytes,
            self.tensors - ticket.tensors,
        )


class QueueLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much may wait here: requests in all, requests of one user, bytes that clients sent."""

    max_requests: int = 8192
    max_requests_per_user: int = 2048
    max_bytes: int = 4 << 30


# ---------------------------------------------------------------- events


class Arrived(msgspec.Struct, frozen=True):
    """A submission came in, unchecked; `nbytes` is what was sent for all of it."""

    requests: tuple[str, ...]
    user: str
    nbytes: int = 0


class Admitted(msgspec.Struct, frozen=True):
    """A submission was checked: its good requests and those that can't run."""

    tickets: tuple[Ticket, ...]
    refused: tuple[str, ...] = ()


class Cancelled(msgspec.Struct, frozen=True):
    """The user does not want this request any more."""

    request: str


class LingerOver(msgspec.Struct, frozen=True):
    """The time that `Linger` for this forward asked for has passed."""

    sequence: int


class PassFinished(msgspec.Struct, frozen=True):
    """The forward `sequence` is over on every shard."""

    sequence: int


class ReplicaReady(msgspec.Struct, frozen=True):
    """All shards are loaded; `packed` says whether requests may share a forward."""

    packed: bool


class ReplicaLost(msgspec.Struct, frozen=True):
    """A shard died or stalled; nothing runs until the replica is ready again."""


Event = Arrived | Admitted | Cancelled | LingerOver | PassFinished | ReplicaReady | ReplicaLost


# ---------------------------------------------------------------- commands


class Accept(msgspec.Struct, frozen=True):
    """There is room: check and price these requests."""

    requests: tuple[str, ...]


class Reject(msgspec.Struct, frozen=True):
    """Don't take this submission; `known` means that an id in it is in use."""

    requests: tuple[str, ...]
    reason: Literal["busy", "known"]
    message: str


class Announce(msgspec.Struct, frozen=True):
    """`position` requests will start before this one."""

    request: str
    position: int


class Linger(msgspec.Struct, frozen=True):
    """Say `LingerOver` in a moment: others are being admitted and may share this forward."""

    sequence: int


class StartPass(msgspec.Struct, frozen=True):
    """Run one forward with these requests, in this order."""

    sequence: int
    requests: tuple[str, ...]
    layout: Layout


class Drop(msgspec.Struct, frozen=True):
    """The request was cancelled, whatever state it was in."""

    request: str


class Abandon(msgspec.Struct, frozen=True):
    """These were in the forward that the lost replica was running."""

    requests: tuple[str, ...]


Command = Accept | Reject | Announce | Linger | StartPass | Drop | Abandon
