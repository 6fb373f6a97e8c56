"""What users ask about the values that are held for their sessions, and the end of idle ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from ndif_actor.coordinator.held import HeldRegistry
from ndif_actor.messages import Settle
from ndif_client.wire.messages import HeldValues

#: Seconds between two looks for idle sessions, at most.
_LOOK_S = 60.0


class Sessions:
    """The registry of held values, and the shards that are told what is dropped.

    Args:
        held: the registry.
        tell: sends something to every shard, after all that was sent before.
        idle_s: after how many seconds a session counts as idle.
    """

    def __init__(self, held: HeldRegistry, tell: Callable[[Settle], None], idle_s: float) -> None:
        self._held = held
        self._tell = tell
        self._look_s = min(_LOOK_S, idle_s / 4)

    def values(self, user: str, session: str) -> HeldValues:
        """Return what is held for a session."""
        return HeldValues(dict(self._held.known(user, session, time.monotonic()).held))

    def drop(self, user: str, session: str, names: Iterable[str]) -> HeldValues:
        """Let go of values at once; return those that there were."""
        gone = self._held.drop(user, session, names, time.monotonic())
        self._tell_changes()
        return HeldValues(gone)

    def drop_all(self, user: str, session: str) -> bool:
        """Let go at once of all that is held for a session; False if there is nothing."""
        found = self._held.drop_session(user, session)
        self._tell_changes()
        return found

    async def run(self) -> None:
        """Let go of what is held for idle sessions, until cancelled."""
        while True:
            await asyncio.sleep(self._look_s)
            self._held.expire(time.monotonic())
            self._tell_changes()

    def _tell_changes(self) -> None:
        changes = self._held.take_changes()
        if changes is not None:
            self._tell(changes)
