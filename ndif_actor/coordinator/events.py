"""What the scheduler is told and what it answers: small frozen records, nothing else."""

from __future__ import annotations

from typing import Literal

import msgspec

from ndif_actor.messages import Forget, Layout, Part, SwapIn, SwapOut


class Continuation(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler needs to know of a generation beyond its cost.

    Attributes:
        prompts: the token ids of each sequence.
        max_new_tokens: of each sequence.
        sharing: pages of the KV cache are shared among generations where this is equal.
        chunkable: its prompt may be fed piece by piece, as nothing looks at the prefill.
        takes_cached: it may begin after pages that others have computed.
        registers_prompt: others may take the pages of its prompt.
        registers_rest: others may also take the pages of what it generates.
        lockstep: sequences that have ended are fed `pad` until all have, as its graph looks at
            them together.
        pad: a token id.
    """

    prompts: list[list[int]]
    max_new_tokens: int
    sharing: int = 0
    chunkable: bool = False
    takes_cached: bool = False
    registers_prompt: bool = False
    registers_rest: bool = False
    lockstep: bool = False
    pad: int = 0


#: Who shares a forward: those that need no gradient, those that do, and nobody.
Lane = Literal["shared", "gradient", "alone"]


class Ticket(msgspec.Struct, frozen=True):
    """An admitted request as the scheduler sees it: an id and what it costs.

    Attributes:
        tokens: rows of the packed batch that it takes; of a generation, in its first forward.
        nbytes: memory that its values take at their peak, in any one forward.
        tensors: how many values it saves in a forward.
        lane: with whom it shares a forward; a generation is not in the gradient lane.
        continuation: of a generation; None for a trace.
        after: earlier requests that must have ended well before it starts; those that are not here
            any more have.
    """

    request: str
    tokens: int
    nbytes: int = 0
    tensors: int = 0
    lane: Lane = "shared"
    continuation: Continuation | None = None
    after: tuple[str, ...] = ()

    @property
    def alone(self) -> bool:
        """Whether it shares its forwards with nobody."""
        return self.lane == "alone"


class Budget(msgspec.Struct, frozen=True):
    """What one forward may carry; a request that is larger by itself runs alone."""

    tokens: int
    nbytes: int = 4 << 30
    #: a frame numbers its buffers with 16 bits, and a saved tuple takes several
    tensors: int = 16_384

    def fits(self, ticket: Ticket, tokens: int) -> bool:
        """Whether `ticket` with `tokens` rows is within it."""
        return (
            tokens <= self.tokens
            and ticket.nbytes <= self.nbytes
            and ticket.tensors <= self.tensors
        )

    def minus(self, ticket: Ticket, tokens: int) -> Budget:
        """Return what `ticket` with `tokens` rows leaves of it."""
        return Budget(
            self.tokens - tokens,
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


class Grown(msgspec.Struct, frozen=True):
    """What a forward has made of a generation, an entry for each of its sequences.

    `tokens` has the sampled token or None, `finished` whether the sequence needs no more.
    """

    request: str
    tokens: tuple[int | None, ...]
    finished: tuple[bool, ...]


class PassFinished(msgspec.Struct, frozen=True):
    """The forward `sequence` is over on every shard.

    Each generation that was in it is either in `grown` or, finished or failed, in `ended`; all
    that have failed are in `failed`.
    """

    sequence: int
    grown: tuple[Grown, ...] = ()
    ended: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


class ReplicaReady(msgspec.Struct, frozen=True):
    """All shards are loaded; `packed` says whether requests may share a forward.

    They have a KV cache of `num_pages` empty pages of `page_tokens` tokens.
    """

    packed: bool
    num_pages: int = 0
    page_tokens: int = 1


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
    """Run one forward: `requests` join it in this order, and `parts` go on, new ones included.

    Attributes:
        cached: for each generation that joins, the pages of each sequence that hold the beginning
            of its prompt already.
        before: what the shards are told first, in this order.
        alone: the only request in it has asked for that.
    """

    sequence: int
    requests: tuple[str, ...]
    layout: Layout
    parts: tuple[Part, ...] = ()
    cached: dict[str, list[list[int]]] = {}
    before: tuple[Forget | SwapOut | SwapIn, ...] = ()
    alone: bool = False

    @property
    def members(self) -> tuple[str, ...]:
        """Everyone in it: those that join, then those that go on."""
        joining = set(self.requests)
        going_on = (part.request for part in self.parts if part.request not in joining)
        return (*self.requests, *going_on)


class Drop(msgspec.Struct, frozen=True):
    """The request was cancelled, whatever state it was in."""

    request: str


class Abandon(msgspec.Struct, frozen=True):
    """These were running on the replica that is lost, or can't run on the one that came back."""

    requests: tuple[str, ...]


class AfterFailed(msgspec.Struct, frozen=True):
    """These will not run: they come after `cause`, or after one of them, and it has failed."""

    requests: tuple[str, ...]
    cause: str


Command = Accept | Reject | Announce | Linger | StartPass | Forget | Drop | Abandon | AfterFailed
