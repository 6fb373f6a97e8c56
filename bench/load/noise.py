"""Whether this machine is quiet: what computes on it while no request is under way."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

#: Seconds of one look.
_LOOK_S = 0.3

#: Columns of /proc/stat that are work: user, nice, system, irq, softirq, steal.
_WORK = (0, 1, 2, 5, 6, 7)


async def busy_cores() -> float | None:
    """Return how many cores were busy over a moment; None where the system does not tell.

    In a container it counts the whole machine, and so shows neighbours that `ps` does not.
    """
    before = _ticks()
    await asyncio.sleep(_LOOK_S)
    after = _ticks()
    if before is None or after is None:
        return None
    return (after - before) / os.sysconf("SC_CLK_TCK") / _LOOK_S


def _ticks() -> int | None:
    try:
        columns = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        return sum(int(columns[number]) for number in _WORK)
    except (OSError, ValueError, IndexError):
        return None
