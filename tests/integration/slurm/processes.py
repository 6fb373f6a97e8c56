"""Find processes of this machine by what is in their environment, to prove that none is left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path


def processes_with(variables: Sequence[str], containing: str = "") -> list[int]:
    """Return the ids of the live processes that were started with all these variables.

    Args:
        variables: "NAME=value" each.
        containing: only processes whose command line holds this text.
    """
    wanted = {variable.encode() for variable in variables}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue  # ended while we looked, or somebody else's
        if wanted.issubset(environment) and containing in command:
            found.append(int(folder.name))
    return found


def wait_for_none(variables: Sequence[str], timeout_s: float) -> list[str]:
    """Wait until no process with these variables is alive; describe what is left."""
    deadline = time.monotonic() + timeout_s
    while (left := processes_with(variables)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [_describe(pid) for pid in left]


def _describe(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except FileNotFoundError:
        command = "(just ended)"
    return f"{pid} {command}"
