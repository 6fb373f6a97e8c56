"""The shards that joined together, until the first of them is lost.

    joining -> loading -> ready -> lost

They live and die together: collectives tie them, and their slices fit no other set.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from ndif_actor.actor.link import Link, LinkClosed, Received
from ndif_actor.errors import ReplicaLost
from ndif_actor.messages import (
    FromShard,
    Hello,
    Loaded,
    LogLine,
    LogLines,
    PassDone,
    RunPass,
    ShardFailed,
)
from ndif_client.wire.frames import FrameError

#: Called with what requests log while a pass runs.
Log = Callable[[list[LogLine]], None]

_log = structlog.get_logger(__name__)


class _Pass(msgspec.Struct):
    """The pass that runs now: who has answered, and what, and who is told what it logs."""

    sequence: int
    log: Log
    finished: asyncio.Future[list[Received[FromShard]]]
    answers: dict[int, Received[FromShard]]


class Incarnation:
    """One set of shards: their links, and what they have said so far.

    Attributes:
        loaded: what each rank reported when its slice was in place.
        all_joined, all_loaded: set when every rank has got that far.
        lost: the reason, once the first shard is lost.
        gone: set while no shard is connected.
        refused_to_load: whether it was lost because a shard can't load the model.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.loaded: dict[int, Loaded] = {}
        self.all_joined = asyncio.Event()
        self.all_loaded = asyncio.Event()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.gone = asyncio.Event()
        self.gone.set()
        self.refused_to_load = False
        self._links: dict[int, Link[FromShard]] = {}
        self._pass: _Pass | None = None
        #: every shard gets the same messages in the same order
        self._telling = asyncio.Lock()

    @property
    def state(self) -> str:
        """Say "ok", or what is missing."""
        if self.lost.done():
            return f"lost ({self.lost.result()})"
        if not self.all_joined.is_set():
            missing = [str(rank) for rank in range(self.world_size) if rank not in self._links]
            return f"waiting for shards {', '.join(missing)} of {self.world_size} to join"
        if not self.all_loaded.is_set():
            return f"{len(self.loaded)} of {self.world_size} shards have loaded"
        return "ok"

    # ------------------------------------------------------------ joining and leaving

    def refusal(self, hello: Hello) -> str | None:
        """Return why a shard may not join, or None."""
        if self.lost.done():
            return "the replica is being restarted"
        if hello.world_size != self.world_size:
            return f"it expects {hello.world_size} shards and the replica has {self.world_size}"
        if not 0 <= hello.rank < self.world_size:
            return f"there is no rank {hello.rank} among {self.world_size}"
        if hello.rank in self._links:
            return f"rank {hello.rank} has joined already"
        return None

    async def attend(self, rank: int, link: Link[FromShard]) -> None:
        """Take a shard in, and what it says, until its link ends."""
        self._links[rank] = link
        self.gone.clear()
        if len(self._links) == self.world_size:
            self.all_joined.set()
        try:
            while True:
                self._take(rank, await link.receive())
        except LinkClosed as error:
            self.lose(f"shard {rank} is gone: {error}")
        finally:
            await link.close()
            del self._links[rank]
            if not self._links:
                self.gone.set()

    def lose(self, reason: str) -> None:
        """Declare the incarnation lost; the first reason counts."""
        if self.lost.done():
            return
        self.lost.set_result(reason)
        if self._pass is not None and not self._pass.finished.done():
            self._pass.finished.set_exception(ReplicaLost(reason))

    async def close_links(self) -> None:
        """Hang up on every shard."""
        for link in list(self._links.values()):
            await link.close()

    # ------------------------------------------------------------ messages

    async def tell_all(self, message: msgspec.Struct, buffers: list[memoryview]) -> None:
        """Send one message to every shard; a failure loses the incarnation."""
        try:
            async with self._telling:
                for rank in sorted(self._links):
                    await self._links[rank].send(message, buffers)
        except (OSError, FrameError) as error:
            # Some have it and some have not: they are no longer in step.
            self.lose(f"{type(message).__name__} could not be sent: {error}")

    async def run_pass(
        self, message: RunPass, buffers: list[memoryview], timeout_s: float, log: Log
    ) -> list[Received[Any]]:
        """Run one pass; return what every rank answered, rank 0 first.

        `log` is called with what requests log meanwhile.

        Raises:
            ReplicaLost: a shard was lost, or did not answer in time.
        """
        if self.lost.done():
            raise ReplicaLost(self.lost.result())
        loop = asyncio.get_running_loop()
        running = self._pass = _Pass(message.sequence, log, loop.create_future(), {})
        stalled = f"forward {message.sequence} took longer than {timeout_s:.0f} s"
        timer = loop.call_later(timeout_s, self.lose, stalled)
        try:
            await self.tell_all(message, buffers)
            return await running.finished
        finally:
            timer.cancel()
            self._pass = None

    def _take(self, rank: int, received: Received[FromShard]) -> None:
        match received.message:
            case PassDone(sequence=sequence):
                self._answer(rank, sequence, received)
                return
            case LogLines(lines=lines):
                if self._pass is not None:
                    self._pass.log(lines)
            case Loaded() as loaded:
                _log.info("shard loaded", **msgspec.structs.asdict(loaded))
                self.loaded[rank] = loaded
                if len(self.loaded) == self.world_size:
                    self.all_loaded.set()
            case ShardFailed(message=message):
                self.refused_to_load = not self.all_loaded.is_set() and not self.lost.done()
                self.lose(f"shard {rank} failed: {message}")
            case Hello():
                self.lose(f"shard {rank} said hello twice")
        received.release()

    def _answer(self, rank: int, sequence: int, received: Received[FromShard]) -> None:
        running = self._pass
        if running is None or running.sequence != sequence or running.finished.done():
            received.release()
            return
        running.answers[rank] = received
        if len(running.answers) == self.world_size:
            running.finished.set_result([running.answers[r] for r in range(self.world_size)])
