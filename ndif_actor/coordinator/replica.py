"""One replica: brings its shards up, runs passes on them, and starts anew when one is lost.

Where the shards come from is a `ShardSource`; what they are to each other is a `Incarnation`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec
import structlog

from ndif_actor.actor.handshake import Address, serve
from ndif_actor.actor.link import Link, LinkClosed
from ndif_actor.coordinator.choice import ModelChoice
from ndif_actor.coordinator.incarnation import Incarnation, Log
from ndif_actor.coordinator.jobs import PassReport
from ndif_actor.coordinator.results import Memory
from ndif_actor.errors import LaunchError, ReplicaLost
from ndif_actor.messages import (
    LINK_LIMITS,
    Forget,
    FromShard,
    GroupResult,
    Hello,
    Load,
    Loaded,
    PassDone,
    RunPass,
    Settle,
    Stop,
    SwapIn,
    SwapOut,
)

_log = structlog.get_logger(__name__)

#: Seconds a new link has to say who it is.
HELLO_TIMEOUT_S = 10.0

#: Seconds that shards get to leave after a `Stop`.
STOP_TIMEOUT_S = 5.0


class ShardSource(Protocol):
    """How the shards of an incarnation come to be and go."""

    async def start(self, address: Address, lost: Callable[[str], None]) -> None:
        """Begin an incarnation that joins at `address`; say `lost` when a process of it ends."""
        ...

    def rendezvous(self) -> tuple[str, int]:
        """Return address and port for torch.distributed; port 0 for the launcher's own."""
        ...

    async def stop(self) -> None:
        """End the incarnation: none of its processes that we started is alive after this."""
        ...

    async def before_restart(self, reason: str, *, worked: bool) -> None:
        """Wait as long as is wise; `worked` says whether an incarnation was ever ready.

        Raises:
            LaunchError: starting again is of no use.
        """
        ...


class ReplicaTimes(msgspec.Struct, frozen=True, kw_only=True):
    """How long each step may take, in seconds; `group_s` is for one collective."""

    join_s: float
    load_s: float
    pass_s: float
    group_s: float


class Replica:
    """The current incarnation, and the loop that brings up one after another."""

    def __init__(
        self,
        world_size: int,
        *,
        source: ShardSource,
        address: Address,
        secret: bytes,
        times: ReplicaTimes,
    ) -> None:
        self._world_size = world_size
        self._source = source
        self._address = address
        self._secret = secret
        self._times = times
        self._incarnation: Incarnation | None = None
        self._ready = False
        #: whether any incarnation was ever ready
        self._worked = False

    @property
    def state(self) -> str:
        """Say "ok" while requests can run, else what is missing."""
        if self._ready:
            return "ok"
        return "starting" if self._incarnation is None else self._incarnation.state

    async def run(
        self,
        choice: ModelChoice,
        cache_bytes: int | None,
        on_ready: Callable[[list[Loaded]], Awaitable[None]],
        on_lost: Callable[[str], None],
    ) -> None:
        """Serve incarnation after incarnation until cancelled; then stop the shards.

        Args:
            choice: what the shards load.
            cache_bytes: for the KV cache of each; None for a share of the memory that is free.
            on_ready: called when all of them have loaded it, with their reports.
            on_lost: called with the reason when an incarnation that was ready is lost.

        Raises:
            LaunchError: the shards don't start, or can't load the model.
        """
        server, address = await serve(
            self._address, self._secret, FromShard, self._welcome, limits=LINK_LIMITS
        )
        _log.info("shards may join", address=str(address), shards=self._world_size)
        try:
            while True:
                reason = await self._live(address, choice, cache_bytes, on_ready, on_lost)
                await self._source.before_restart(reason, worked=self._worked)
        finally:
            server.close()

    async def tell(self, message: Settle | Forget | SwapOut | SwapIn) -> None:
        """Tell every shard something about requests; it has no answer.

        Where the replica is lost there is nobody left who would have to know.
        """
        if self._incarnation is not None and not self._incarnation.lost.done():
            await self._incarnation.tell_all(message, [])

    async def run_pass(self, message: RunPass, buffers: list[memoryview], log: Log) -> PassReport:
        """Run one pass on every shard.

        Raises:
            ReplicaLost: a shard was lost, or did not answer in time.
        """
        if self._incarnation is None:
            raise ReplicaLost("no shard has joined yet")
        answers = await self._incarnation.run_pass(message, buffers, self._times.pass_s, log)
        results: dict[str, list[GroupResult]] = {}
        forward_s = 0.0
        for answer in answers:
            done: PassDone = answer.message
            forward_s = max(forward_s, done.forward_s)
            for result in done.results:
                results.setdefault(result.request, []).append(result)
        for answer in answers[1:]:
            answer.release()
        buffers = answers[0].buffers
        memory = Memory(sum(buffer.nbytes for buffer in buffers), answers[0].release)
        return PassReport(results, forward_s, buffers, memory)

    # ------------------------------------------------------------ one incarnation

    async def _live(
        self,
        address: Address,
        choice: ModelChoice,
        cache_bytes: int | None,
        on_ready: Callable[[list[Loaded]], Awaitable[None]],
        on_lost: Callable[[str], None],
    ) -> str:
        """Bring up an incarnation and wait for its end; return why it ended."""
        incarnation = self._incarnation = Incarnation(self._world_size)
        bringing_up = asyncio.create_task(
            self._bring_up(incarnation, choice, cache_bytes, on_ready)
        )
        try:
            await self._source.start(address, incarnation.lose)
            await asyncio.wait((bringing_up, incarnation.lost), return_when=asyncio.FIRST_COMPLETED)
            if bringing_up.done():
                bringing_up.result()
            reason = await incarnation.lost
            _log.error("replica lost", reason=reason)
            if self._ready:
                self._ready = False
                on_lost(reason)
            if incarnation.refused_to_load and not self._worked:
                raise LaunchError(reason)
            return reason
        except asyncio.CancelledError:
            await incarnation.tell_all(Stop(), [])
            await self._wait_until_gone(incarnation)
            raise
        finally:
            self._ready = False
            bringing_up.cancel()
            await incarnation.close_links()
            await self._source.stop()

    async def _bring_up(
        self,
        incarnation: Incarnation,
        choice: ModelChoice,
        cache_bytes: int | None,
        on_ready: Callable[[list[Loaded]], Awaitable[None]],
    ) -> None:
        if not await _in_time(incarnation.all_joined, self._times.join_s):
            incarnation.lose(f"{incarnation.state} for {self._times.join_s:.0f} s")
            return
        master_addr, master_port = self._source.rendezvous()
        load = Load(
            folder=choice.folder,
            dtype=choice.dtype,
            cache_bytes=cache_bytes,
            device=choice.device,
            master_addr=master_addr,
            master_port=master_port,
            group_timeout_s=self._times.group_s,
        )
        await incarnation.tell_all(load, [])
        if not await _in_time(incarnation.all_loaded, self._times.load_s):
            incarnation.lose(f"{incarnation.state} after {self._times.load_s:.0f} s")
            return
        self._ready = self._worked = True
        await on_ready([incarnation.loaded[rank] for rank in range(self._world_size)])

    async def _wait_until_gone(self, incarnation: Incarnation) -> None:
        if not await _in_time(incarnation.gone, STOP_TIMEOUT_S):
            _log.warning("shards did not leave in time", timeout_s=STOP_TIMEOUT_S)

    async def _welcome(self, link: Link[FromShard]) -> None:
        """Attend to a new link: its first message says which shard it is."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                received = await link.receive()
        except (LinkClosed, TimeoutError):
            await link.close()
            return
        hello, incarnation = received.message, self._incarnation
        received.release()
        if not isinstance(hello, Hello) or incarnation is None:
            await link.close()
            return
        refusal = incarnation.refusal(hello)
        if refusal is not None:
            _log.warning("shard refused", rank=hello.rank, host=hello.host, reason=refusal)
            await link.close()
            return
        _log.info("shard joined", rank=hello.rank, host=hello.host, pid=hello.pid)
        await incarnation.attend(hello.rank, link)


async def _in_time(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
