"""Our client, asked as peers are; it talks to a server in another process over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.load.scenarios import Request, write
from bench.peers.process import Answers, Crowd

#: Numbers of an answer that are compared, as in `scripts/protocol.py`.
_COMPARED = 16


class Ours:
    """Users of one server, each with a session of his own.

    Args:
        url: of the server.
        users: how many sessions to open.
    """

    def __init__(self, url: str, users: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._sessions: list[Any] = self._loop.run_until_complete(_open(url, users))
        self.layers: int = self._sessions[0].tree.num_layers
        self.vocabulary: int = self._sessions[0].tree.vocab_size

    def sizes(self) -> tuple[int, int]:
        """Return how many layers and how large a vocabulary the model has."""
        return self.layers, self.vocabulary

    def round(self, requests: Sequence[Request]) -> Answers:
        """Run requests one after another."""
        answers = Answers([], [])
        for request in requests:
            began = time.perf_counter()
            found = self._loop.run_until_complete(_run(self._sessions[0], request))
            answers.seconds.append(time.perf_counter() - began)
            answers.values.append(_digest(found))
        return answers

    def crowd(self, requests: Sequence[Sequence[Request]], seconds: float) -> Crowd:
        """Let users ask without pause, each again and again the requests of his own."""
        return self._loop.run_until_complete(self._crowd(requests, seconds))

    def close(self) -> None:
        """Close all sessions."""
        self._loop.run_until_complete(_close(self._sessions))
        self._loop.close()

    async def _crowd(self, requests: Sequence[Sequence[Request]], seconds: float) -> Crowd:
        latencies: list[float] = []
        began = time.perf_counter()

        async def ask(session: Any, own: Sequence[Request]) -> None:
            number = 0
            while time.perf_counter() - began < seconds:
                sent = time.perf_counter()
                await _run(session, own[number % len(own)])
                latencies.append(time.perf_counter() - sent)
                number += 1

        await asyncio.gather(*map(ask, self._sessions, requests))
        return Crowd(latencies, time.perf_counter() - began)


async def _open(url: str, users: int) -> list[Any]:
    from ndif_client import connect

    return [await connect(url, tensors="numpy") for _ in range(users)]


async def _close(sessions: list[Any]) -> None:
    for session in sessions:
        await session.close()


async def _run(session: Any, request: Request) -> Any:
    """Run a request; return what its user gets: an array, a list of arrays or a list of ids."""
    result = await write(session, request, lambda step: None)
    if request.new_tokens:
        return result.new_ids
    (name,) = result.keys()
    return result[name]


def _digest(found: Any) -> list[float]:
    if isinstance(found, list) and np.size(found[-1]) > 1:
        found = found[-1]
    if isinstance(found, list):
        return [float(np.ravel(number)[0]) for number in found]
    return [float(number) for number in np.asarray(found, np.float32).reshape(-1)[-_COMPARED:]]
