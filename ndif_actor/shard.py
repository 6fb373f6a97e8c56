"""The actor that owns one device: joins a coordinator, loads its slice, runs what it is told.

    coordinator -> link -> mailbox -> device thread -> link -> coordinator

The event loop only moves messages, so heartbeats and losses are seen during a forward; what they
ask for runs in one dedicated thread, in the order it came. A shard never outlives its
coordinator: when the link ends, the process does, whatever its device is doing.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import NoReturn

import structlog

from ndif_actor.actor.handshake import Address, Refused, connect
from ndif_actor.actor.link import Link, LinkClosed, Received
from ndif_actor.actor.thread import WorkThread
from ndif_actor.device import Device, Place
from ndif_actor.errors import LaunchError, ModelError, ReplicaLost
from ndif_actor.exits import ExitCode
from ndif_actor.messages import (
    LINK_LIMITS,
    Forget,
    Hello,
    Load,
    LogLine,
    LogLines,
    RunPass,
    Settle,
    ShardFailed,
    Stop,
    SwapIn,
    SwapOut,
    ToShard,
)

_log = structlog.get_logger(__name__)

#: Seconds to wait for a coordinator that is not there yet, and between two attempts.
JOIN_TIMEOUT_S = 300.0
_RETRY_S = 0.5

#: Seconds that leaving the process group may take.
_LEAVE_TIMEOUT_S = 3.0


class ShardActor:
    """One shard from joining to its end."""

    def __init__(self, link: Link[ToShard], place: Place, device: Device) -> None:
        self._link = link
        self._place = place
        self._device = device
        self._thread = WorkThread("device")

    async def run(self) -> ExitCode:
        """Serve until told to stop; return how the process is to end."""
        place = self._place
        hello = Hello(
            rank=place.rank,
            world_size=place.world_size,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        mailbox: asyncio.Queue[Received[ToShard]] = asyncio.Queue()
        working = asyncio.create_task(self._work(mailbox))
        listening = asyncio.create_task(self._listen(mailbox))
        try:
            await self._link.send(hello)
            await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            return listening.result()
        except LinkClosed as error:
            _log.error("coordinator lost", reason=str(error))
            return ExitCode.REPLICA_LOST
        finally:
            working.cancel()
            listening.cancel()

    async def _listen(self, mailbox: asyncio.Queue[Received[ToShard]]) -> NoReturn:
        """Fill the mailbox until the link ends, which ends this process too."""
        while True:
            mailbox.put_nowait(await self._link.receive())

    async def _work(self, mailbox: asyncio.Queue[Received[ToShard]]) -> ExitCode:
        """Do what the messages say, one after another."""
        while True:
            received = await mailbox.get()
            try:
                match received.message:
                    case Load() as load:
                        await self._load(load)
                    case RunPass() as message:
                        await self._run_pass(message, received.buffers)
                    case Settle() | Forget() | SwapOut() | SwapIn() as message:
                        await self._thread.call(self._device.tend, message)
                    case Stop():
                        return await self._leave()
            except LinkClosed:
                raise
            except Exception as error:
                return await self._fail(received.message, error)
            finally:
                received.release()

    async def _load(self, load: Load) -> None:
        _log.info("loading", folder=load.folder, dtype=load.dtype, device=load.device)
        await self._link.send(await self._thread.call(self._device.load, load))

    async def _run_pass(self, message: RunPass, buffers: list[memoryview]) -> None:
        loop = asyncio.get_running_loop()
        lines: asyncio.Queue[LogLine | None] = asyncio.Queue()

        def tell(line: LogLine | None) -> None:
            loop.call_soon_threadsafe(lines.put_nowait, line)

        sending = asyncio.create_task(self._send_lines(lines))
        try:
            done, saved = await self._thread.call(
                self._device.run, message, buffers, self._link.allocate, tell
            )
        finally:
            tell(None)
            await sending
        await self._link.send(done, saved)

    async def _send_lines(self, lines: asyncio.Queue[LogLine | None]) -> None:
        """Send what is logged as it comes, up to None."""
        ended = False
        while not ended:
            waiting = [await lines.get()]
            while not lines.empty():
                waiting.append(lines.get_nowait())
            ended = waiting[-1] is None
            if written := [line for line in waiting if line is not None]:
                await self._link.send(LogLines(written))

    async def _leave(self) -> ExitCode:
        try:
            async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                await self._thread.call(self._device.leave)
        except TimeoutError:
            _log.warning("the process group could not be left in time")
        return ExitCode.OK

    async def _fail(self, message: ToShard, error: Exception) -> ExitCode:
        """Report what this shard can't survive."""
        what = type(message).__name__
        expected = isinstance(error, ModelError | LaunchError | ReplicaLost)
        _log.error("shard failed", doing=what, error=str(error), exc_info=not expected)
        text = str(error) if expected else f"{what}: {type(error).__name__}: {error}"
        await self._link.send(ShardFailed(rank=self._place.rank, message=text))
        await self._link.close()
        return _EXIT_CODES.get(type(error), ExitCode.ERROR)


_EXIT_CODES: dict[type[Exception], ExitCode] = {
    ModelError: ExitCode.MODEL,
    LaunchError: ExitCode.LAUNCH,
    ReplicaLost: ExitCode.REPLICA_LOST,
}


async def run_shard(address: Address, secret: bytes, place: Place, device: Device) -> ExitCode:
    """Join the coordinator at `address` and serve it to the end.

    Raises:
        LaunchError: it can't be reached, or does not know the secret.
    """
    link = await _join(address, secret)
    _log.info("joined", address=str(address), rank=place.rank, world_size=place.world_size)
    return await ShardActor(link, place, device).run()


async def _join(address: Address, secret: bytes) -> Link[ToShard]:
    """Connect, waiting for a coordinator that starts later than its shards."""
    try:
        async with asyncio.timeout(JOIN_TIMEOUT_S):
            while True:
                try:
                    return await connect(address, secret, ToShard, limits=LINK_LIMITS)
                except Refused as error:
                    raise LaunchError(f"{address}: {error}") from None
                except OSError as error:
                    _log.debug("not there yet", address=str(address), error=str(error))
                await asyncio.sleep(_RETRY_S)
    except TimeoutError:
        raise LaunchError(f"no coordinator at {address} for {JOIN_TIMEOUT_S:.0f} s") from None
