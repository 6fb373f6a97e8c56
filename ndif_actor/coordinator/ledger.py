"""Every request this server knows, by id: unfinished ones as jobs, finished ones as results."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from ndif_actor.coordinator.held import HeldRegistry
from ndif_actor.coordinator.jobs import Job
from ndif_actor.coordinator.results import Outgoing, ResultStore
from ndif_client.wire.messages import Failed, Fault


class Ledger:
    """Jobs become results when they end, and are forgotten in time.

    Args:
        store: for the results.
        held: where what they keep is reserved.
    """

    def __init__(self, store: ResultStore, held: HeldRegistry) -> None:
        self._store = store
        self._held = held
        self._opened = 0
        self._jobs: dict[str, Job] = {}
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._expiry: asyncio.TimerHandle | None = None

    def __contains__(self, request: str) -> bool:
        return request in self._jobs or request in self._store

    def open(self, jobs: Iterable[Job]) -> None:
        """Take in requests that have just arrived."""
        for job in jobs:
            self._opened += 1
            job.number = self._opened
            self._jobs[job.id] = job
        if self._jobs:
            self._none_open.clear()

    def job(self, request: str) -> Job:
        """Return an unfinished request.

        Raises:
            KeyError: there is none of that id.
        """
        return self._jobs[request]

    def find_job(self, request: str, owner: str) -> Job | None:
        """Return an unfinished request of this owner."""
        job = self._jobs.get(request)
        return job if job is not None and job.owner == owner else None

    def jobs(self) -> list[Job]:
        """Return all unfinished requests."""
        return list(self._jobs.values())

    def is_open(self, job: Job) -> bool:
        """Whether `job` itself, not another of the same id, is unfinished."""
        return self._jobs.get(job.id) is job

    def find(self, request: str, owner: str) -> Outgoing | None:
        """Return the result of a request, or its progress while it is unfinished."""
        job = self._jobs.get(request)
        if job is not None:
            return Outgoing(event=job.progress) if job.owner == owner else None
        return self._store.get(request, owner)

    def end(self, job: Job, outgoing: Outgoing) -> None:
        """Tell and keep the last event of a request."""
        del self._jobs[job.id]
        job.stream.push(outgoing)
        now = time.monotonic()
        self._held.release(job.id, now)
        self._store.put(job.owner, outgoing, now)
        job.gathered.let_go()
        self._expire()
        if not self._jobs:
            self._none_open.set()

    def fail(self, job: Job, fault: Fault) -> None:
        """End a request without a result."""
        self.end(job, Outgoing(event=Failed(job.id, fault)))

    def forget(self, request: str) -> None:
        """Drop a kept result."""
        self._store.forget(request)

    def mark_delivered(self, request: str) -> None:
        """Note that the client has received the whole result."""
        self._store.mark_delivered(request)

    async def wait_until_none_open(self) -> None:
        """Wait until every request has ended."""
        await self._none_open.wait()

    def close(self) -> None:
        """Drop every result."""
        if self._expiry is not None:
            self._expiry.cancel()
        self._store.clear()

    def _expire(self) -> None:
        """Drop results whose time is over, and come back when the next one's is."""
        now = time.monotonic()
        self._store.expire(now)
        next_s = self._store.next_expiry()
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if next_s is not None:
            self._expiry = asyncio.get_running_loop().call_later(next_s - now, self._expire)
