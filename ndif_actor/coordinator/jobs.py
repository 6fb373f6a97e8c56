"""The unfinished requests: who sent each, how far it is, and where its events go."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

import msgspec
import structlog
from msgspec.structs import replace

from ndif_actor.coordinator.admission import Prepared
from ndif_actor.coordinator.events import Grown, StartPass
from ndif_actor.coordinator.gathering import Gathered
from ndif_actor.coordinator.results import Memory, Outgoing
from ndif_actor.coordinator.screening import moved_constant
from ndif_actor.coordinator.stream import EventStream
from ndif_actor.messages import Group, GroupResult, LogLine, RunPass
from ndif_client.wire.graph import Constant
from ndif_client.wire.messages import (
    Completion,
    Done,
    Event,
    Failed,
    Fault,
    Generated,
    Logged,
    Queued,
    Statistics,
)

_log = structlog.get_logger(__name__)


class Job(msgspec.Struct, kw_only=True):
    """One unfinished request.

    Attributes:
        user, session: whose held values it uses and keeps.
        number: in the order of arrival.
        checked: set when it is known whether it can run.
        prepared: set at admission.
        started_s: when its first pass starts.
        statistics: what it has cost so far; set after its first pass.
        gathered: what it has saved so far.
    """

    id: str
    owner: str
    user: str
    session: str | None
    stream: EventStream
    arrived_s: float
    progress: Event
    number: int = 0
    checked: asyncio.Event = msgspec.field(default_factory=asyncio.Event)
    prepared: Prepared | None = None
    started_s: float = 0.0
    statistics: Statistics | None = None
    gathered: Gathered = msgspec.field(default_factory=Gathered)

    def tell(self, event: Event) -> None:
        """Send progress to whoever listens."""
        self.progress = event
        self.stream.push(Outgoing(event=event))

    def log(self, line: LogLine) -> None:
        """Send a line that the request has logged to whoever listens; nobody keeps it."""
        self.stream.push(Outgoing(event=Logged(self.id, line.node, line.step, line.text)))

    @property
    def generates(self) -> bool:
        """Whether it goes on after its first pass."""
        return self.prepared is not None and self.prepared.group.decoding is not None


def new_job(
    request: str,
    owner: str,
    stream: EventStream,
    now: float,
    *,
    user: str = "",
    session: str | None = None,
) -> Job:
    """Return the job of a request that has just arrived."""
    return Job(
        id=request,
        owner=owner,
        user=user,
        session=session,
        stream=stream,
        arrived_s=now,
        progress=Queued(request, 0),
    )


def build_pass(start: StartPass, jobs: list[Job]) -> tuple[RunPass, list[memoryview]]:
    """Put the groups that join a pass and the constants of all of them into one message.

    Args:
        start: what the scheduler has decided.
        jobs: at least those that join, in that order at the front.
    """
    buffers: list[memoryview] = []
    groups = []
    for job, _ in zip(jobs, start.requests, strict=False):
        assert job.prepared is not None, "only admitted requests are started"
        group = _shifted(job.prepared.group, len(buffers), job.prepared.buffers)
        if job.id in start.cached:
            group = replace(group, cached=start.cached[job.id])
        groups.append(group)
        buffers += job.prepared.buffers
    message = RunPass(
        sequence=start.sequence, layout=start.layout, groups=groups, parts=list(start.parts)
    )
    return message, buffers


def _shifted(group: Group, offset: int, own: list[memoryview]) -> Group:
    if not own or not offset:
        return group
    nodes = [
        moved_constant(node, node.tensor.buffer + offset) if isinstance(node, Constant) else node
        for node in group.graph.nodes
    ]
    graph = replace(group.graph, nodes=nodes)
    return replace(group, graph=graph)


class PassReport(msgspec.Struct, frozen=True):
    """What the shards said about one pass, and the memory that rank 0's values lie in.

    `results` has, per request, what each rank that mentions it reported, rank 0 first.
    """

    results: dict[str, list[GroupResult]]
    forward_s: float
    buffers: list[memoryview]
    memory: Memory


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a pass has brought a request.

    Attributes:
        grown: of a generation that goes on, for the scheduler.
        generated: its new tokens, for the client.
        last: its last event, if it has ended.
        kept: the names that it has kept, if it has ended well.
    """

    grown: Grown | None = None
    generated: Generated | None = None
    last: Outgoing | None = None
    kept: Sequence[str] = ()


def advance(job: Job, report: PassReport, now: float) -> Progress:
    """Take in what a pass has made of `job`, whose statistics are up to date already.

    Args:
        job: was in the pass.
        report: of the pass; its memory is held meanwhile.
        now: the time, of the same clock as the job's.
    """
    try:
        return _advance(job, report, now)
    except Exception:
        # Our own mistake must not take the neighbours' requests down with it.
        _log.exception("a pass could not be taken in", request=job.id)
        return _failed(job, "internal", "the server failed (its log says why)")


def _advance(job: Job, report: PassReport, now: float) -> Progress:
    found = report.results.get(job.id, [])
    for result in found:
        if result.fault is not None:
            return Progress(last=_broken_off(job, result.fault, found[0], report))
    if not found or job.prepared is None or job.statistics is None:
        return _failed(job, "internal", "the shards returned no result for this request")
    try:
        job.gathered.add(found[0], report.buffers, report.memory)
    except ValueError as error:
        return _failed(job, "limit", str(error))
    if not job.generates:
        last = _done(job, job.prepared, job.statistics, [])
        return Progress(last=last, kept=found[0].kept)
    completions = job.prepared.completions
    if len(found[0].tokens) != len(completions):
        return _failed(job, "internal", "the shards returned no tokens for this request")
    sequences, texts = [], []
    for number, (completion, token) in enumerate(zip(completions, found[0].tokens, strict=True)):
        if token is not None and completion.finish is None:
            sequences.append(number)
            texts.append(completion.add(token, is_last=found[0].has_ended))
    generated = None
    if sequences:
        if job.statistics.first_token_s is None:
            job.statistics = replace(job.statistics, first_token_s=now - job.arrived_s)
        generated = Generated(
            id=job.id,
            step=len(completions[sequences[0]].ids) - 1,
            sequences=sequences,
            tokens=[completions[number].ids[-1] for number in sequences],
            texts=texts,
        )
    finished = tuple(completion.finish is not None for completion in completions)
    if all(finished):
        last = _completed(job, job.prepared, job.statistics)
        return Progress(generated=generated, last=last, kept=found[0].kept)
    return Progress(
        grown=Grown(job.id, tuple(found[0].tokens), finished),
        generated=generated,
    )


def count_pass(
    job: Job, start: StartPass, jobs: list[Job], forward_s: float, page_tokens: int
) -> None:
    """Add a pass to what `job` has cost; of a generation's, the first tells whom it shared with.

    Args:
        job: was in the pass.
        start: the pass.
        jobs: all that were in it.
        forward_s: how long it took.
        page_tokens: tokens of a page of the KV cache.
    """
    known = job.statistics
    if known is not None:
        job.statistics = replace(
            known, forward_s=known.forward_s + forward_s, forwards=known.forwards + 1
        )
        return
    job.statistics = Statistics(
        queue_s=job.started_s - job.arrived_s,
        forward_s=forward_s,
        forward=start.sequence,
        groups=len(jobs),
        tokens=_tokens_of(start, jobs),
        numerics="solo" if start.layout == "dense" or start.alone else "fast",
        cached_tokens=page_tokens * sum(map(len, start.cached.get(job.id, []))),
    )


def _tokens_of(start: StartPass, jobs: list[Job]) -> int:
    fed = sum(feed.count for part in start.parts for feed in part.feeds)
    traces = (job.prepared for job in jobs if not job.generates)
    return fed + sum(prepared.ticket.tokens for prepared in traces if prepared is not None)


def _failed(job: Job, kind: Literal["internal", "limit"], message: str) -> Progress:
    return Progress(last=Outgoing(event=Failed(job.id, Fault(kind=kind, message=message))))


def _broken_off(job: Job, fault: Fault, result: GroupResult, report: PassReport) -> Outgoing:
    """Return the end of a job that has failed, with what it had saved before."""
    with suppress(ValueError):  # too much for one reply
        job.gathered.add(result, report.buffers, report.memory)
    saved = job.gathered.tensors or job.gathered.tuples
    if not saved or job.prepared is None or job.statistics is None:
        return Outgoing(event=Failed(job.id, fault))
    if job.generates:
        last = _completed(job, job.prepared, job.statistics)
    else:
        last = _done(job, job.prepared, job.statistics, [])
    assert isinstance(last.event, Done)
    return replace(last, event=Failed(job.id, fault, last.event))


def _completed(job: Job, prepared: Prepared, statistics: Statistics) -> Outgoing:
    each = iter(prepared.completions)
    completions = [[next(each).completion() for _ in invoke] for invoke in prepared.prompts]
    return _done(job, prepared, statistics, completions)


def _done(
    job: Job, prepared: Prepared, statistics: Statistics, completions: list[list[Completion]]
) -> Outgoing:
    gathered = job.gathered
    event = Done(
        id=job.id,
        prompts=prepared.prompts,
        tensors=gathered.tensors,
        tuples=gathered.tuples,
        statistics=statistics,
        completions=completions,
    )
    return Outgoing(event=event, buffers=gathered.buffers, memories=tuple(gathered.memories))
