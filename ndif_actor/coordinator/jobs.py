"""The unfinished requests: who sent each, how far it is, and where its events go."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec.structs import replace

from ndif_actor.coordinator.admission import Prepared
from ndif_actor.coordinator.events import StartPass
from ndif_actor.coordinator.results import Memory, Outgoing
from ndif_actor.coordinator.screening import moved_constant
from ndif_actor.coordinator.stream import EventStream
from ndif_actor.messages import Group, GroupResult, RunPass
from ndif_client.wire.frames import FrameLimits
from ndif_client.wire.graph import Constant
from ndif_client.wire.messages import Done, Event, Failed, Fault, Queued, Statistics
from ndif_client.wire.tensors import TensorSpec

#: Saved values up to this many bytes are copied: they would keep their neighbours' memory alive.
COPY_BYTES = 64 << 10

#: Buffers in one reply; clients accept no more in a frame.
MAX_BUFFERS = FrameLimits().max_buffers


class Job(msgspec.Struct, kw_only=True):
    """One unfinished request; `prepared` is set at admission, `started_s` when its pass starts."""

    id: str
    owner: str
    stream: EventStream
    arrived_s: float
    progress: Event
    prepared: Prepared | None = None
    started_s: float = 0.0

    def tell(self, event: Event) -> None:
        """Send progress to whoever listens."""
        self.progress = event
        self.stream.push(Outgoing(event=event))


def new_job(request: str, owner: str, stream: EventStream, now: float) -> Job:
    """Return the job of a request that has just arrived."""
    progress = Queued(request, 0)
    return Job(id=request, owner=owner, stream=stream, arrived_s=now, progress=progress)


def build_pass(start: StartPass, jobs: list[Job]) -> tuple[RunPass, list[memoryview]]:
    """Put the groups of one pass and the constants of all of them into one message."""
    buffers: list[memoryview] = []
    groups = []
    for job in jobs:
        assert job.prepared is not None, "only admitted requests are started"
        groups.append(_shifted(job.prepared.group, len(buffers), job.prepared.buffers))
        buffers += job.prepared.buffers
    return RunPass(sequence=start.sequence, layout=start.layout, groups=groups), buffers


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


def outcome(job: Job, statistics: Statistics, report: PassReport) -> Outgoing:
    """Return the last event of `job`: its values, or why there are none."""
    found = report.results.get(job.id, [])
    for result in found:
        if result.fault is not None:
            return Outgoing(event=Failed(job.id, result.fault))
    if not found or job.prepared is None:
        return _failed(job, "internal", "the shards returned no result for this request")
    count = len(found[0].tensors) + sum(len(saved.items) for saved in found[0].tuples)
    if count > MAX_BUFFERS:
        most = f"one reply carries at most {MAX_BUFFERS}"
        return _failed(job, "limit", f"{count} tensors were saved; {most}")
    return _with_values(job.prepared, found[0], statistics, report)


def statistics_of(job: Job, start: StartPass, jobs: list[Job], forward_s: float) -> Statistics:
    """Return what `job` cost and whom it shared with."""
    return Statistics(
        queue_s=job.started_s - job.arrived_s,
        forward_s=forward_s,
        forward=start.sequence,
        groups=len(jobs),
        tokens=sum(other.prepared.ticket.tokens for other in jobs if other.prepared is not None),
        numerics="solo" if start.layout == "dense" else "fast",
    )


def _failed(job: Job, kind: Literal["internal", "limit"], message: str) -> Outgoing:
    return Outgoing(event=Failed(job.id, Fault(kind=kind, message=message)))


def _with_values(
    prepared: Prepared, result: GroupResult, statistics: Statistics, report: PassReport
) -> Outgoing:
    """Make the frame of one request out of its part of the pass's buffers."""
    buffers: list[memoryview] = []
    shared = False

    def take(spec: TensorSpec) -> TensorSpec:
        nonlocal shared
        buffer = report.buffers[spec.buffer]
        if buffer.nbytes <= COPY_BYTES:
            buffer = memoryview(bytes(buffer))
        else:
            shared = True
        buffers.append(buffer)
        return replace(spec, buffer=len(buffers) - 1)

    tensors = [replace(saved, tensor=take(saved.tensor)) for saved in result.tensors]
    tuples = [replace(saved, items=[take(item) for item in saved.items]) for saved in result.tuples]
    event = Done(
        id=result.request,
        prompts=prepared.prompts,
        tensors=tensors,
        tuples=tuples,
        statistics=statistics,
    )
    return Outgoing(event=event, buffers=buffers, memory=report.memory if shared else None)
