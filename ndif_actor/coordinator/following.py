"""Requests that come after others, among those that are here and those that were."""

from __future__ import annotations

import time
from collections.abc import Mapping

from msgspec.structs import replace

from ndif_actor.coordinator.admission import Prepared
from ndif_actor.coordinator.events import Ticket
from ndif_actor.coordinator.held import HeldRegistry, Known
from ndif_actor.coordinator.jobs import Job
from ndif_actor.coordinator.ledger import Ledger
from ndif_actor.coordinator.outlook import Cause, Outlook, after_failure
from ndif_actor.coordinator.screening import refused
from ndif_actor.errors import RequestError
from ndif_client.wire.messages import Failed, Fault, HeldSpec, Submission, TraceRequest

#: Why a request has failed, where nobody can tell any more.
_UNKNOWN = Fault(kind="internal", message="the server failed (its log says why)")


class Following:
    """Finds the requests that others come after."""

    def __init__(self, ledger: Ledger, held: HeldRegistry) -> None:
        self._ledger = ledger
        self._held = held

    async def wait_until_checked(self, submission: Submission, jobs: list[Job]) -> None:
        """Wait for the earlier requests that are still being checked."""
        for request, job in zip(submission.requests, jobs, strict=True):
            for name in request.after:
                other = self._ledger.find_job(name, job.owner)
                if other is not None and other.number < jobs[0].number:
                    await other.checked.wait()

    def outlook(self, submission: Submission, owner: str, user: str) -> Outlook:
        """Return what the requests of a submission may count on."""
        sessions: dict[str, Known] = {}
        keeps: dict[str, Mapping[str, HeldSpec]] = {}
        failed: dict[str, Cause] = {}
        now = time.monotonic()
        for request in submission.requests:
            session = request.session
            if session is not None and session not in sessions:
                sessions[session] = self._held.known(user, session, now)
            for name in request.after:
                other = self._ledger.find_job(name, owner)
                if other is None:
                    cause = self._failure(name, owner)
                    if cause is not None:
                        failed[name] = cause
                elif other.prepared and (other.user, other.session) == (user, session):
                    keeps[name] = other.prepared.kept
        return Outlook(sessions, keeps, failed)

    def take_in(self, request: TraceRequest, job: Job, answer: Prepared | Fault) -> Ticket:
        """Note in its job that a request may run, make room for what it keeps, return its ticket.

        Raises:
            RequestError: it may not run, or there is no room.
        """
        if isinstance(answer, Fault):
            raise RequestError(answer)
        ticket = replace(answer.ticket, after=self._unfinished(request, job))
        group = answer.group
        if answer.keeps or group.held:
            assert job.session is not None, "held values without a session are refused"
            now = time.monotonic()
            scope = self._held.reserve(job.id, job.user, job.session, answer.keeps, now)
            group = replace(group, scope=scope)
        job.prepared = replace(answer, ticket=ticket, group=group)
        return ticket

    def _unfinished(self, request: TraceRequest, job: Job) -> tuple[str, ...]:
        """Return those that a request comes after and that have not ended.

        Raises:
            RequestError: one of them has failed, is not known, or has come later.
        """
        found = []
        for name in request.after:
            other = self._ledger.find_job(name, job.owner)
            if other is not None:
                if other.number >= job.number:
                    raise refused(
                        "protocol", f"it comes after request {name}, which is a later one"
                    )
                found.append(name)
            elif (cause := self._failure(name, job.owner)) is not None:
                raise RequestError(after_failure(cause))
            elif self._ledger.find(name, job.owner) is None:
                raise refused(
                    "protocol",
                    f"it comes after request {name}, which is not here: never sent, or forgotten",
                )
        return tuple(found)

    def failure_of(self, request: str, owner: str) -> Fault:
        """Return why those can't run that come after a request, which has failed."""
        return after_failure(self._failure(request, owner) or Cause(request, _UNKNOWN))

    def _failure(self, request: str, owner: str) -> Cause | None:
        found = self._ledger.find(request, owner)
        if found is None or not isinstance(found.event, Failed):
            return None
        return Cause(request, found.event.fault)
