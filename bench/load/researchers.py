"""Users of a server, all in one process of their own, each with a client session of their own."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from bench.prompts import Request


class Round(msgspec.Struct, frozen=True):
    """What a group of users saw when they all asked at once.

    Attributes:
        seconds: from before the first experiment is written until the last value is an array.
        forwards: how many forward passes the server ran for them.
        forward_s: the longest of these, as the server measured it.
        queue_s: the longest wait before a forward, likewise.
        tokens: rows that all of them sent.
    """

    seconds: float
    forwards: int
    forward_s: float
    queue_s: float
    tokens: int


class Researchers:
    """Users connected to one server.

    Args:
        url: of the server.
        users: how many sessions to open.
    """

    def __init__(self, url: str, users: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._sessions: list[Any] = self._loop.run_until_complete(_open(url, users))

    def ask(self, requests: list[Request], logits: bool) -> Round:
        """Let as many users as there are requests ask at the same time; one request each.

        Args:
            requests: one per user; each saves the output of a layer.
            logits: save the logits of the last token too.
        """
        return self._loop.run_until_complete(self._ask(requests, logits))

    def saved(self, request: Request) -> list[float]:
        """Return the values that a request saves, flattened."""
        result = self._loop.run_until_complete(_run(self._sessions[0], request, False))
        flat: list[float] = result["hidden"].float().flatten().tolist()
        return flat

    def close(self) -> None:
        """Close all sessions."""
        self._loop.run_until_complete(_close(self._sessions))
        self._loop.close()

    async def _ask(self, requests: list[Request], logits: bool) -> Round:
        pairs = zip(self._sessions[: len(requests)], requests, strict=True)
        began = time.perf_counter()
        results = await asyncio.gather(*(_run(s, request, logits) for s, request in pairs))
        seconds = time.perf_counter() - began
        seen = [result.statistics for result in results]
        return Round(
            seconds=seconds,
            forwards=len({each.forward for each in seen}),
            forward_s=max(each.forward_s for each in seen),
            queue_s=max(each.queue_s for each in seen),
            tokens=sum(len(result.token_ids) for result in results),
        )


async def _open(url: str, users: int) -> list[Any]:
    from ndif_client import connect

    return [await connect(url) for _ in range(users)]


async def _close(sessions: list[Any]) -> None:
    for session in sessions:
        await session.close()


async def _run(session: Any, request: Request, logits: bool) -> Any:
    """Write one experiment, have it run, and make arrays of what came back."""
    trace = session.trace(request.prompt)
    with trace:
        trace.hidden = session.model.model.layers[request.layer].output
        if logits:
            trace.logits = session.model.lm_head.output[:, -1]
    result = await trace
    for name in result:
        _ = result[name]
    return result
