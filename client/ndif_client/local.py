"""A private server: `ndif-actor serve` as a child process that never outlives its user.

The child holds a pipe from us as its standard input and ends when the pipe does, so it goes even
where we are killed; it has a process group of its own, so that Ctrl-C reaches only us.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from ndif_client.errors import ServerStartError

_READY = re.compile(rb"^ndif-actor ready: (\S+)")

#: Lines of the server's log kept for error messages.
_TAIL_LINES = 40

#: Seconds the server may take to end by itself, then by SIGTERM.
_STOP_S = (10.0, 5.0)

#: Bytes read from the log at once, and kept of one line.
_CHUNK_BYTES = 64 << 10

#: Seconds to wait for its last words.
_EXPLAIN_S = 2.0


class LocalServer:
    """One server process.

    Args:
        model: what to serve: a folder, a hub id or "demo".
        options: further options of `ndif-actor serve`.
    """

    def __init__(self, model: str, options: Sequence[str] = ()) -> None:
        self._model = model
        self._options = options
        self._process: asyncio.subprocess.Process | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._ready: asyncio.Future[str] | None = None
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)

    async def start(self) -> str:
        """Start it and return its URL once it serves.

        Raises:
            ServerStartError: the server part is not installed, or it ended before it was ready.
        """
        if any(importlib.util.find_spec(name) is None for name in ("ndif_actor", "torch")):
            raise ServerStartError(
                f"connect('local:{self._model}') needs the server: pip install 'ndif-actor[server]'"
            )
        command = ["serve", self._model, "--port", "0", "--exit-with-stdin", *self._options]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "ndif_actor.cli",
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self._ready = asyncio.get_running_loop().create_future()
        out, err = self._process.stdout, self._process.stderr
        assert out is not None
        assert err is not None
        self._readers = [
            asyncio.ensure_future(self._read_output(out)),
            asyncio.ensure_future(self._read_log(err)),
        ]
        return await self._ready

    async def stop(self) -> None:
        """End it, gently first; nothing of it is left behind."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        for wait_s, sign in zip(_STOP_S, (signal.SIGTERM, signal.SIGKILL), strict=True):
            try:
                async with asyncio.timeout(wait_s):
                    await process.wait()
                break
            except TimeoutError:
                _signal_group(process.pid, sign)
        await process.wait()
        # Its shards hold the same pipes: they end when the last of them has.
        await asyncio.wait(self._readers, timeout=_STOP_S[0])
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def explain(self) -> str:
        """Return what is known of its end, if it has ended or does so now."""
        process = self._process
        assert process is not None
        try:
            async with asyncio.timeout(_EXPLAIN_S):
                await process.wait()
                await asyncio.wait(self._readers[1:])
        except TimeoutError:
            return ""
        log = "\n".join(f"  {line}" for line in self._tail)
        return (
            f"the private server has ended with status {process.returncode}; its last words:\n{log}"
        )

    async def _read_output(self, stream: asyncio.StreamReader) -> None:
        assert self._ready is not None
        assert self._process is not None
        async for line in stream:
            found = _READY.match(line)
            if found and not self._ready.done():
                self._ready.set_result(found[1].decode())
        if not self._ready.done():
            known = await self.explain()
            message = f"`ndif-actor serve {self._model}` did not start: {known}"
            self._ready.set_exception(ServerStartError(message))

    async def _read_log(self, stream: asyncio.StreamReader) -> None:
        # By chunks, because a line may be of any length, and the pipe must never fill up.
        rest = b""
        while chunk := await stream.read(_CHUNK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            self._tail.extend(line.decode(errors="replace") for line in lines)
            rest = rest[-_CHUNK_BYTES:]
        if rest:
            self._tail.append(rest.decode(errors="replace"))


def _signal_group(pid: int, sign: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, sign)
