"""Generations driven without a coordinator: pages handed out, passes made, tokens collected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ndif_actor.engine.cache import PAGE_TOKENS
from ndif_actor.engine.engine import Engine
from ndif_actor.messages import Feed, Group, GroupResult, Part, RunPass
from ndif_client.wire.graph import Graph
from ndif_client.wire.messages import Decoding, Fault
from ndif_client.wire.tensors import import_array
from tests.requests import Request, allocate, moved_constants, saved


class Outcome(msgspec.Struct):
    """What a request has come to so far."""

    tokens: list[list[int]]
    saved: dict[tuple[int, int], Any]
    fault: Fault | None = None


class _Running(msgspec.Struct):
    group: Group
    buffers: list[bytes]
    steps: int
    outcome: Outcome
    done: list[int]
    pages: list[list[int]]
    chunk: int | None = None
    joined: bool = False
    swapped: bool = False


class Driver:
    """Plays the coordinator for one engine; all ranks of a replica do the same together."""

    def __init__(self, engine: Engine) -> None:
        assert engine.cache is not None
        self.engine = engine
        self.free = list(range(engine.cache.num_pages))
        self.outcomes: dict[str, Outcome] = {}
        self._running: dict[str, _Running] = {}
        self._sequence = 0

    @property
    def busy(self) -> bool:
        return bool(self._running)

    @property
    def running(self) -> list[str]:
        return list(self._running)

    @property
    def swappable(self) -> list[str]:
        """Those that are in the middle: they have joined, and their pages are here."""
        return [name for name, one in self._running.items() if one.joined and not one.swapped]

    def start(
        self,
        name: str,
        request: Request,
        steps: int,
        chunk: int | None = None,
        **decoding: Any,
    ) -> None:
        """Let a generation join the next pass; its prompt is fed in chunks if a size is given."""
        group = msgspec.structs.replace(
            request.group(0, 0),
            request=name,
            decoding=Decoding(max_new_tokens=steps, **decoding),
        )
        prompts = [ids for invoke in group.invokes for ids in invoke]
        outcome = self.outcomes[name] = Outcome([[] for _ in prompts], {})
        buffers = request.recorder.buffers
        empty: list[list[int]] = [[] for _ in prompts]
        self._running[name] = _Running(
            group, buffers, steps, outcome, [0] * len(prompts), empty, chunk
        )

    def step(self, traces: Sequence[Request] = ()) -> list[dict[int, Any]]:
        """Make one pass of everything that runs, and some traces; return what these saved."""
        self._sequence += 1
        groups, buffers, parts = [], [], []
        for name, running in self._running.items():
            if running.swapped:
                continue
            if not running.joined:
                groups.append(_moved(running.group, len(buffers)))
                buffers += [memoryview(raw) for raw in running.buffers]
                running.joined = True
            parts.append(Part(name, self._feeds(running)))
        for number, trace in enumerate(traces):
            group = trace.group(number, len(buffers))
            groups.append(msgspec.structs.replace(group, request=f"trace-{number}"))
            buffers += [memoryview(raw) for raw in trace.recorder.buffers]
        message = RunPass(sequence=self._sequence, layout="packed", groups=groups, parts=parts)
        results, out = self.engine.run_pass(message, buffers, allocate)
        by_name = {result.request: result for result in results}
        for name in [part.request for part in parts]:
            self._take(name, by_name.get(name) or self._unreported(name), out)
        return [saved(by_name[f"trace-{number}"], out) for number in range(len(traces))]

    def finish(self) -> dict[str, Outcome]:
        """Make passes until nothing runs."""
        while self._running:
            self.step()
        self.free.sort()
        return self.outcomes

    def stop(self, name: str) -> None:
        """Let a generation leave."""
        running = self._running.pop(name)
        if not running.swapped:
            self._release(running)
        self.engine.forget([name])

    def swap_out(self, name: str) -> None:
        running = self._running[name]
        self.engine.swap_out(name)
        self._release(running)
        running.swapped = True

    def swap_in(self, name: str) -> None:
        running = self._running[name]
        running.pages = [[self.free.pop(0) for _ in pages] for pages in running.pages]
        self.engine.swap_in(name, running.pages)
        running.swapped = False

    def _release(self, running: _Running) -> None:
        self.free += [page for pages in running.pages for page in pages]

    def _feeds(self, running: _Running) -> list[Feed]:
        feeds = []
        prompts = [ids for invoke in running.group.invokes for ids in invoke]
        for number, ids in enumerate(prompts):
            known = len(ids) + len(running.outcome.tokens[number])
            count = min(known - running.done[number], running.chunk or known)
            running.done[number] += count
            short = -(-running.done[number] // PAGE_TOKENS) - len(running.pages[number])
            new = [self.free.pop() for _ in range(short)]
            running.pages[number] += new
            feeds.append(Feed(count, new))
        return feeds

    def _unreported(self, name: str) -> GroupResult:
        """Return what a rank knows that reports nothing."""
        own = self.engine._generations[name].sequences
        made = self._running[name].outcome.tokens
        prompts = [ids for invoke in self._running[name].group.invokes for ids in invoke]
        tokens: list[int | None] = []
        for continued, ids, known in zip(own, prompts, made, strict=True):
            new = continued.ids[len(ids) + len(known) :]
            tokens.append(new[0] if new else None)
        return GroupResult(request=name, tokens=tokens)

    def _take(self, name: str, result: Any, out: list[memoryview]) -> None:
        running = self._running[name]
        if result.fault is not None:
            running.outcome.fault = result.fault
            self.stop(name)
            return
        for item in result.tensors:
            value = import_array(item.tensor, out[item.tensor.buffer], "torch")
            running.outcome.saved[item.node, item.step] = value
        for tokens, token in zip(running.outcome.tokens, result.tokens, strict=True):
            if token is not None:
                tokens.append(token)
        if len(running.outcome.tokens[0]) >= running.steps:
            self.stop(name)


def _moved(group: Group, first_buffer: int) -> Group:
    graph = group.graph
    nodes = moved_constants(graph.nodes, first_buffer)
    moved = Graph(nodes, graph.sources, graph.at, graph.steps, graph.during)
    return msgspec.structs.replace(group, graph=moved)
