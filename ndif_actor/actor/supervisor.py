"""Child processes that live and die with their parent, and how often they may be restarted."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress

from ndif_actor.errors import LaunchError

#: Seconds between SIGTERM and SIGKILL.
GRACE_S = 5.0

_PR_SET_PDEATHSIG = 1


class Child:
    """A running process in a group of its own; `exited` tells its exit status at once."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.pid = process.pid
        self.exited: asyncio.Task[int] = asyncio.ensure_future(process.wait())

    async def stop(self, grace_s: float = GRACE_S) -> int:
        """End the whole group: SIGTERM, then SIGKILL after `grace_s` seconds; return its status."""
        self._signal(signal.SIGTERM)
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.exited), grace_s)
        # The leader may have left children behind in its group.
        self._signal(signal.SIGKILL)
        return await self.exited

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


async def start_child(name: str, argv: Sequence[str], environment: Mapping[str, str]) -> Child:
    """Start a process that reads nothing and shares our output.

    Raises:
        LaunchError: it can't be started.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,
        )
    except OSError as error:
        raise LaunchError(f"{name} can't be started: {error}") from None
    return Child(name, process)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, of that pid, ends in whatever way."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)


class RestartPolicy:
    """Exponential back-off, and an end to it. Time comes from outside."""

    def __init__(
        self,
        max_restarts: int = 5,
        window_s: float = 300.0,
        first_delay_s: float = 0.5,
        max_delay_s: float = 30.0,
    ) -> None:
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._first_delay_s = first_delay_s
        self._max_delay_s = max_delay_s
        self._restarts: deque[float] = deque()

    def next_delay(self, now: float) -> float | None:
        """Return how many seconds to wait before restarting, or None if it happens too often."""
        while self._restarts and now - self._restarts[0] > self._window_s:
            self._restarts.popleft()
        if len(self._restarts) >= self._max_restarts:
            return None
        delay = min(self._first_delay_s * 2.0 ** len(self._restarts), self._max_delay_s)
        self._restarts.append(now)
        return delay
