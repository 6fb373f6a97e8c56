"""The one process clients talk to: admits requests, starts passes, answers.

    HTTP -> submit -> Admission -> Scheduler -> Replica -> ResultStore and EventStreams -> HTTP

It ties the parts together and decides nothing itself: every decision is the scheduler's, and
every change of state happens on the event loop, in `_tell`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog

from ndif_actor.config import ServerConfig
from ndif_actor.coordinator import events
from ndif_actor.coordinator.admission import Admission, RequestLimits
from ndif_actor.coordinator.capacity import CacheSize, cache_size
from ndif_actor.coordinator.choice import choose
from ndif_actor.coordinator.following import Following
from ndif_actor.coordinator.held import HeldLimits, HeldRegistry
from ndif_actor.coordinator.jobs import (
    Job,
    advance,
    build_pass,
    count_pass,
    new_job,
)
from ndif_actor.coordinator.ledger import Ledger
from ndif_actor.coordinator.pace import Pace
from ndif_actor.coordinator.replica import Replica
from ndif_actor.coordinator.results import ResultStore
from ndif_actor.coordinator.scheduler import Scheduler
from ndif_actor.coordinator.screening import check_protocol
from ndif_actor.coordinator.sessions import Sessions
from ndif_actor.coordinator.stream import EventStream
from ndif_actor.errors import LaunchError, ReplicaLost, RequestError
from ndif_actor.messages import Forget, Loaded, LogLine, Settle
from ndif_client.wire.frames import Frame
from ndif_client.wire.messages import (
    Done,
    Explanations,
    Failed,
    Fault,
    ModelSummary,
    Queued,
    Running,
    Submission,
)

_log = structlog.get_logger(__name__)

#: Seconds after which a client may ask again while the replica loads or restarts.
RESTART_RETRY_S = 5.0

#: What a decoded header takes in memory, as a multiple of its bytes on the wire.
DECODED_FACTOR = 16


class KnownRequestError(RequestError):
    """An id of the submission belongs to a request that is already here."""


class Coordinator:
    """The served model, its queue and its results."""

    def __init__(self, config: ServerConfig, model_id: str, replica: Replica) -> None:
        self.model_id = model_id
        self.admission = Admission(
            model_id,
            RequestLimits(value_bytes=config.max_value_bytes, saved_bytes=config.max_saved_bytes),
            share_prefixes=config.share_prefixes,
        )
        self._config = config
        self._replica = replica
        self._scheduler = Scheduler(
            events.Budget(config.max_pass_tokens, config.max_pass_bytes),
            events.QueueLimits(
                max_requests=config.max_queued,
                max_requests_per_user=config.max_queued_per_user,
                max_bytes=config.max_queued_bytes,
            ),
            config.max_swapped_tokens,
        )
        self._held = HeldRegistry(
            HeldLimits(
                user_bytes=config.max_held_bytes,
                total_bytes=config.max_held_bytes_in_all,
                idle_s=config.held_for_s,
            )
        )
        self.ledger = Ledger(ResultStore(config.result_ttl_s, config.max_result_bytes), self._held)
        self._following = Following(self.ledger, self._held)
        self.sessions = Sessions(self._held, self._tell_shards, config.held_for_s)
        self._tasks: set[asyncio.Task[None]] = set()
        self._summary: ModelSummary | None = None
        self._tree_json: bytes | None = None
        self._draining = False
        self._lost_reason = ""
        self._pace = Pace()
        self._cache = CacheSize()
        #: set when the model is first served; `device` is known from then on
        self.ready = asyncio.Event()
        self.device = ""

    # ------------------------------------------------------------ life

    async def run(self, folder: Path) -> None:
        """Load the model and serve it, incarnation after incarnation, until cancelled.

        Raises:
            ModelError: the model can't be served as asked.
            LaunchError: its shards can't be started.
        """
        choice = choose(folder, self._config.dtype, self._config.device)
        loading = asyncio.create_task(self.admission.load(choice, self._config.tp))
        serving = asyncio.create_task(
            self._replica.run(
                choice, self._config.cache_bytes, self._become_ready, self._become_lost
            )
        )
        tidying = asyncio.create_task(self.sessions.run())
        try:
            await asyncio.gather(loading, serving)
        except LaunchError:
            await loading  # what is wrong with the model is said better here
            raise
        finally:
            for task in (loading, serving, tidying):
                task.cancel()
            await asyncio.gather(loading, serving, tidying, return_exceptions=True)

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and wait for what is here, for at most `timeout_s` seconds."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self.ledger.wait_until_none_open()
        except TimeoutError:
            _log.warning("drain timed out", unfinished=len(self.ledger.jobs()))
        message = "the server has shut down before this request could finish"
        for job in self.ledger.jobs():
            self._give_up(job, Fault(kind="unavailable", message=message))

    async def close(self) -> None:
        """Let go of everything; `run` has ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.ledger.close()
        await self.admission.close()

    async def _become_ready(self, loaded: list[Loaded]) -> None:
        unpackable = next((shard.unpackable for shard in loaded if shard.unpackable), None)
        await self.admission.withhold(loaded[0].withheld)
        tree = await self.admission.tree(loaded[0].device, unpackable)
        self._tree_json = msgspec.json.encode(tree)
        self._summary = ModelSummary(
            id=tree.id,
            dtype=tree.dtype,
            tensor_parallel=tree.tensor_parallel,
            packed=tree.packed,
            ready=True,
        )
        self.device = tree.device
        self._cache = cache_size(loaded, tree.unpackable)
        self.admission.set_cache(self._cache)
        self._tell(events.ReplicaReady(tree.packed, self._cache.num_pages, self._cache.page_tokens))
        self.ready.set()

    def _become_lost(self, reason: str) -> None:
        self._lost_reason = reason
        self._held.lose_all()
        self._tell(events.ReplicaLost())

    # ------------------------------------------------------------ what HTTP asks

    def checks(self) -> dict[str, str]:
        """Return what must be "ok" before requests are taken, each with what is missing."""
        return {
            "accepting": "draining" if self._draining else "ok",
            "replica": self._replica.state,
        }

    def check_serving(self) -> None:
        """Refuse requests while they could not be served.

        Raises:
            RequestError: draining, or the replica is not ready.
        """
        failing = [f"{name}: {state}" for name, state in self.checks().items() if state != "ok"]
        if failing:
            message = f"this server is not ready ({'; '.join(failing)})"
            raise RequestError(
                Fault(kind="unavailable", message=message, retry_after=RESTART_RETRY_S)
            )

    def summary(self) -> ModelSummary:
        """Describe the model in one line.

        Raises:
            RequestError: it has not been loaded yet.
        """
        if self._summary is None:
            self.check_serving()
            raise AssertionError("a replica is ready only when its model is known")
        return msgspec.structs.replace(self._summary, ready=self._replica.state == "ok")

    def tree_json(self) -> bytes:
        """Return the encoded model tree.

        Raises:
            RequestError: the model has not been loaded yet.
        """
        self.summary()
        assert self._tree_json is not None
        return self._tree_json

    async def submit(self, frame: Frame, *, owner: str, user: str) -> EventStream:
        """Take a submission in; its requests are admitted together.

        Args:
            frame: header `Submission`; its buffers are kept until its requests have ended.
            owner: who may fetch and cancel them.
            user: whose turns they take.

        Returns:
            The events of all its requests; whoever stops reading it closes it.

        Raises:
            RequestError: the whole submission is refused: not ready, no room, wrong version.
            msgspec.DecodeError: the header is no submission.
        """
        submission = await self._decode(frame)
        names = tuple(request.id for request in submission.requests)
        nbytes = DECODED_FACTOR * len(frame.header) + sum(b.nbytes for b in frame.buffers)
        self._check_new(names)
        (answer,) = self._scheduler.handle(events.Arrived(names, user, nbytes))
        if isinstance(answer, events.Reject):
            raise self._rejection(answer)
        stream = EventStream(names)
        now = time.monotonic()
        jobs = [
            new_job(request.id, owner, stream, now, user=user, session=request.session)
            for request in submission.requests
        ]
        self.ledger.open(jobs)
        self._spawn(self._admit(submission, frame.buffers, user, jobs), jobs)
        return stream

    async def explain(self, frame: Frame, *, owner: str, user: str) -> Explanations:
        """Say what each request of a submission would cost, and run none of them.

        Args:
            frame: header `Submission`.
            owner, user: who asks.

        Raises:
            RequestError: not ready, wrong version, or one of the requests can't run.
            msgspec.DecodeError: the header is no submission.
        """
        submission = await self._decode(frame)
        outlook = self._following.outlook(submission, owner, user)
        found = await self.admission.explain(submission, frame.buffers, user, outlook)
        return Explanations(found)

    def cancel(self, request: str, owner: str) -> bool:
        """Cancel an unfinished request, forget a finished one; False if there is none."""
        found = self.ledger.find(request, owner)
        if found is None:
            return False
        if isinstance(found.event, Done | Failed):
            self.ledger.forget(request)
        else:
            self._tell(events.Cancelled(request))
        return True

    # ------------------------------------------------------------ arrival

    async def _decode(self, frame: Frame) -> Submission:
        self.check_serving()
        submission = await self.admission.decode(frame.header)
        check_protocol(submission)
        self.check_serving()
        return submission

    def _check_new(self, names: tuple[str, ...]) -> None:
        seen: set[str] = set()
        for name in names:
            if name in seen:
                message = f"two requests of one submission have the id {name}"
                raise RequestError(Fault(kind="protocol", message=message))
            if name in self.ledger:
                message = f"request {name} is already here; GET /v1/traces/{name} fetches it"
                raise KnownRequestError(Fault(kind="protocol", message=message))
            seen.add(name)

    def _rejection(self, answer: events.Reject) -> RequestError:
        retry_after = self._pace.wait_s(self._scheduler.statistics().queued)
        return RequestError(Fault(kind="busy", message=answer.message, retry_after=retry_after))

    async def _admit(
        self, submission: Submission, buffers: list[memoryview], user: str, jobs: list[Job]
    ) -> None:
        try:
            await self._following.wait_until_checked(submission, jobs)
            outlook = self._following.outlook(submission, jobs[0].owner, user)
            answers = await self.admission.admit(submission, buffers, user, outlook)
            tickets, refused = [], []
            for request, job, answer in zip(submission.requests, jobs, answers, strict=True):
                if not self.ledger.is_open(job):
                    continue  # cancelled meanwhile
                try:
                    tickets.append(self._following.take_in(request, job, answer))
                except RequestError as error:
                    refused.append(job.id)
                    self.ledger.fail(job, error.fault)
            self._tell(events.Admitted(tuple(tickets), tuple(refused)))
        finally:
            for job in jobs:
                job.checked.set()

    # ------------------------------------------------------------ decisions carried out

    def _tell(self, event: events.Event) -> None:
        for command in self._scheduler.handle(event):
            self._obey(command)

    def _obey(self, command: events.Command) -> None:
        match command:
            case events.Announce(request=request, position=position):
                self.ledger.job(request).tell(Queued(request, position))
            case events.StartPass():
                self._start_pass(command)
            case events.Linger(sequence=sequence):
                loop = asyncio.get_running_loop()
                loop.call_later(self._pace.linger_s(), self._tell, events.LingerOver(sequence))
            case Forget():
                self._tell_shards(command)
            case events.Drop(request=request):
                fault = Fault(kind="cancelled", message="cancelled by its user")
                self.ledger.fail(self.ledger.job(request), fault)
            case events.AfterFailed(requests=requests, cause=cause):
                for request in requests:
                    job = self.ledger.job(request)
                    self.ledger.fail(job, self._following.failure_of(cause, job.owner))
            case events.Abandon(requests=requests):
                message = f"{self._lost_reason}; the replica restarts, send the request again"
                fault = Fault(kind="unavailable", message=message, retry_after=RESTART_RETRY_S)
                for request in requests:
                    self.ledger.fail(self.ledger.job(request), fault)
            case _:
                raise AssertionError(f"{command} is an answer, not a command")

    def _tell_shards(self, message: Settle | Forget) -> None:
        self._spawn(self._replica.tell(message), [])

    def _start_pass(self, start: events.StartPass) -> None:
        jobs = [self.ledger.job(request) for request in start.members]
        now = time.monotonic()
        for job in jobs[: len(start.requests)]:
            job.started_s = now
            job.tell(Running(job.id, len(jobs)))
        # What is to be told first is taken now: the next to be told something comes after this.
        self._spawn(self._run_pass(start, jobs, self._held.take_changes()), jobs)

    async def _run_pass(
        self, start: events.StartPass, jobs: list[Job], changes: Settle | None
    ) -> None:
        start_s = time.monotonic()
        try:
            message, buffers = build_pass(start, jobs)
            if changes is not None:
                await self._replica.tell(changes)
            for command in start.before:
                _log.debug("before the pass", sequence=start.sequence, command=str(command))
                await self._replica.tell(command)
            report = await self._replica.run_pass(message, buffers, self._log_lines)
        except ReplicaLost:
            return  # `_become_lost` abandons the requests
        except Exception:
            members = start.members
            self._tell(events.PassFinished(start.sequence, ended=members, failed=members))
            raise
        _log.debug("pass", sequence=start.sequence, groups=len(jobs), forward_s=report.forward_s)
        self._pace.note(len(jobs), time.monotonic() - start_s)
        with report.memory:
            # Whoever is not open any more was cancelled while it ran.
            going_on = [job for job in jobs if self.ledger.is_open(job)]
            for job in going_on:
                count_pass(job, start, jobs, report.forward_s, self._cache.page_tokens)
            now = time.monotonic()
            steps = [(job, advance(job, report, now)) for job in going_on]
            grown = tuple(step.grown for _, step in steps if step.grown is not None)
            ended = {job.id: step.last for job, step in steps if step.last is not None}
            failed = {name for name, last in ended.items() if isinstance(last.event, Failed)}
            for job, step in steps:
                if step.last is None:
                    continue
                if job.id in failed:  # those that come after it have to be told why
                    self.ledger.end(job, step.last)
                else:
                    self._held.commit(job.id, step.kept)
            # The next pass starts before this one's results are handed out.
            self._tell(
                events.PassFinished(start.sequence, grown, tuple(ended), tuple(sorted(failed)))
            )
            for job, step in steps:
                if not self.ledger.is_open(job):
                    continue
                if step.generated is not None:
                    job.tell(step.generated)
                if step.last is not None:
                    self.ledger.end(job, step.last)

    def _log_lines(self, lines: list[LogLine]) -> None:
        """Pass on what requests log while they run."""
        for line in lines:
            with suppress(KeyError):  # cancelled meanwhile
                self.ledger.job(line.request).log(line)

    # ------------------------------------------------------------ ends

    def _give_up(self, job: Job, fault: Fault) -> None:
        """End a request that the scheduler still counts on."""
        if self.ledger.is_open(job):
            self.ledger.fail(job, fault)
            for command in self._scheduler.handle(events.Cancelled(job.id)):
                if command != events.Drop(job.id):
                    self._obey(command)

    def _spawn(self, work: Coroutine[None, None, None], jobs: list[Job]) -> None:
        """Run `work` by itself; whatever goes wrong in it, its requests are answered."""

        def finished(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            error = None if task.cancelled() else task.exception()
            if error is None:
                return
            _log.error("request handling failed", exc_info=error)
            fault = Fault(kind="internal", message="the server failed (its log says why)")
            for job in jobs:
                self._give_up(job, fault)

        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(finished)
