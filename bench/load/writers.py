"""Users who let the model of a server write, in one process, each with a session of their own."""

from __future__ import annotations

import asyncio
import statistics
import time
from itertools import pairwise
from typing import Any

#: Tokens that each of the others makes undisturbed before a new user comes.
_SETTLED = 8


class Writers:
    """Users connected to one server.

    Args:
        url: of the server.
        users: how many sessions to open.
    """

    def __init__(self, url: str, users: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._sessions: list[Any] = self._loop.run_until_complete(_open(url, users))

    def write(self, prompts: list[str], steps: int) -> float:
        """Let as many users as there are prompts generate at the same time; return the seconds."""
        return self._loop.run_until_complete(self._write(prompts, steps))

    def tokens(self, prompt: str, steps: int) -> list[int]:
        """Return the tokens generated after a prompt."""
        generation = self._sessions[0].generate(prompt, max_new_tokens=steps, eos=False)
        made: list[int] = self._loop.run_until_complete(_finished(generation)).new_ids
        return made

    def first_tokens(self, prompts: list[str], newcomers: int) -> list[float]:
        """Let new users come while the others decode; return what each waits, in forwards.

        Args:
            prompts: of those who decode meanwhile, one a user; the last one is the newcomers'.
            newcomers: how many come, one after another.

        Returns:
            For each, the seconds from asking to the first token, divided by the median time
            between two tokens of somebody else just before.
        """
        return self._loop.run_until_complete(self._first_tokens(prompts, newcomers))

    def close(self) -> None:
        """Close all sessions."""
        self._loop.run_until_complete(_close(self._sessions))
        self._loop.close()

    async def _write(self, prompts: list[str], steps: int) -> float:
        began = time.perf_counter()
        results = await asyncio.gather(
            *(
                session.generate(prompt, max_new_tokens=steps, eos=False)
                for session, prompt in zip(self._sessions, prompts, strict=False)
            )
        )
        seconds = time.perf_counter() - began
        if any(len(result.new_ids) != steps for result in results):
            raise RuntimeError(f"not everybody got {steps} tokens")
        return seconds

    async def _first_tokens(self, prompts: list[str], newcomers: int) -> list[float]:
        *others, own = prompts
        many = 2 * _SETTLED * (newcomers + 2)
        pairs = zip(self._sessions, others, strict=False)
        decoding = [s.generate(p, max_new_tokens=many, eos=False) for s, p in pairs]
        stamps = [_Stamps() for _ in decoding]
        following = [
            asyncio.create_task(each.follow(generation))
            for each, generation in zip(stamps, decoding, strict=True)
        ]
        waits = []
        try:
            for number in range(newcomers):
                recent = await asyncio.gather(*(each.next(_SETTLED) for each in stamps))
                step = statistics.median(b - a for times in recent for a, b in pairwise(times))
                # Not in step with the others' forwards, as a user would not be.
                await asyncio.sleep(step * ((0.37 * number) % 1.0))
                asked = time.perf_counter()
                async for _ in self._sessions[-1].generate(own, max_new_tokens=1, eos=False):
                    waits.append((time.perf_counter() - asked) / step)
                    break
                if any(each.ended for each in stamps):
                    raise RuntimeError("somebody had stopped decoding when a new user came")
        finally:
            for generation in decoding:
                await generation.cancel()
            await asyncio.gather(*following, return_exceptions=True)
        return waits


async def _open(url: str, users: int) -> list[Any]:
    from ndif_client import connect

    return [await connect(url) for _ in range(users)]


async def _close(sessions: list[Any]) -> None:
    for session in sessions:
        await session.close()


async def _finished(generation: Any) -> Any:
    return await generation


class _Stamps:
    """When the tokens of one generation came.

    Attributes:
        ended: whether there will be no more.
    """

    def __init__(self) -> None:
        self.ended = False
        self._times: list[float] = []
        self._news = asyncio.Event()

    async def follow(self, generation: Any) -> None:
        try:
            async for _ in generation:
                self._times.append(time.perf_counter())
                self._news.set()
        finally:
            self.ended = True
            self._news.set()

    async def next(self, count: int) -> list[float]:
        """Wait for so many more tokens; return the times of the latest."""
        wanted = len(self._times) + count
        while len(self._times) < wanted:
            if self.ended:
                raise RuntimeError(f"a generation ended after {len(self._times)} tokens")
            self._news.clear()
            await self._news.wait()
        return self._times[-count:]
