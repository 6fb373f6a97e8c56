"""Where shards come from: started by us on this machine, or by srun, torchrun or a person."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping

import structlog

from ndif_actor.actor.handshake import Address
from ndif_actor.actor.launch import SECRET_VARIABLE
from ndif_actor.actor.supervisor import Child, RestartPolicy, start_child
from ndif_actor.errors import LaunchError

_log = structlog.get_logger(__name__)

#: Tells a shard that we started whose death it must not survive.
PARENT_VARIABLE = "NDIF_ACTOR_PARENT"

_LOOPBACK = "127.0.0.1"


class SpawnedShards:
    """One child process a shard, on this machine."""

    def __init__(self, world_size: int, secret: bytes, shard_options: list[str]) -> None:
        self._world_size = world_size
        self._secret = secret
        self._options = shard_options
        self._children: list[Child] = []
        self._stopping = False
        self._policy = RestartPolicy()

    async def start(self, address: Address, lost: Callable[[str], None]) -> None:
        """Start all of them; `lost` hears of the first that ends."""
        self._stopping = False
        command = [sys.executable, "-m", "ndif_actor.cli", "shard", "--join", str(address)]
        for rank in range(self._world_size):
            environment = self._environment(rank)
            child = await start_child(f"shard {rank}", [*command, *self._options], environment)
            self._children.append(child)
            child.exited.add_done_callback(functools.partial(self._on_exit, child.name, lost))
            _log.info("shard started", rank=rank, pid=child.pid)

    def rendezvous(self) -> tuple[str, int]:
        """Return a port of the loopback interface that is free now."""
        with socket.socket() as probe:
            probe.bind((_LOOPBACK, 0))
            return _LOOPBACK, probe.getsockname()[1]

    async def stop(self) -> None:
        """End all of them and wait until they have ended."""
        self._stopping = True
        await asyncio.gather(*(child.stop() for child in self._children))
        self._children.clear()

    async def before_restart(self, reason: str, *, worked: bool) -> None:
        """Back off; give up when it never worked, or fails too often."""
        if not worked:
            raise LaunchError(f"the shards did not start: {reason}")
        delay_s = self._policy.next_delay(time.monotonic())
        if delay_s is None:
            raise LaunchError(f"the replica fails too often, the last time: {reason}")
        _log.info("replica restarts", delay_s=delay_s)
        await asyncio.sleep(delay_s)

    def _environment(self, rank: int) -> Mapping[str, str]:
        return {
            **os.environ,
            SECRET_VARIABLE: self._secret.decode(),
            PARENT_VARIABLE: str(os.getpid()),
            "RANK": str(rank),
            "WORLD_SIZE": str(self._world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(self._world_size),
            "MASTER_ADDR": _LOOPBACK,
        }

    def _on_exit(self, name: str, lost: Callable[[str], None], exited: asyncio.Task[int]) -> None:
        if self._stopping or exited.cancelled():
            return
        lost(f"{name} {describe_exit(exited.result())}")


class JoiningShards:
    """Processes that somebody else starts, and starts again when they have ended."""

    async def start(self, address: Address, lost: Callable[[str], None]) -> None:
        """Nothing: whoever knows the address and the secret joins."""

    def rendezvous(self) -> tuple[str, int]:
        """Leave it to MASTER_ADDR and MASTER_PORT in the shards' environment."""
        return "", 0

    async def stop(self) -> None:
        """Nothing: a shard whose link ends exits by itself."""

    async def before_restart(self, reason: str, *, worked: bool) -> None:
        """Wait for nothing: the next set joins when it is there."""
        _log.info("waiting for a new set of shards to join")


def describe_exit(status: int) -> str:
    """Say how a process ended, from its status as asyncio gives it."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"
