"""A server of one's own for the time of a benchmark, started by the command a user would type."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

_READY = "ndif-actor ready: "

#: Seconds for the drain, before the server is killed.
_STOP_S = 40.0


@contextmanager
def serving(model: str, dtype: str, *options: str) -> Iterator[str]:
    """Within the block a server runs at the URL yielded; its log is shown only if it fails.

    Args:
        model: a local folder, a hub id, or "demo".
        dtype: "bfloat16", "float32", ...
        options: more of those that `ndif-actor serve` takes.
    """
    command = [sys.executable, "-m", "ndif_actor.cli", "serve", model, "--dtype", dtype]
    command += ["--port", "0", "--exit-with-stdin", *options]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            yield _url(server, log)
        finally:
            _stop(server)


def _url(server: subprocess.Popen[str], log: IO[str]) -> str:
    """Wait for the ready line and return the URL in it."""
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith(_READY):
            return line.removeprefix(_READY).split()[0]
    log.seek(0)
    raise SystemExit(f"the server ended with status {server.wait()}:\n{log.read()}")


def _stop(server: subprocess.Popen[str]) -> None:
    assert server.stdin is not None and server.stdout is not None
    server.stdin.close()
    try:
        server.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    server.stdout.close()
