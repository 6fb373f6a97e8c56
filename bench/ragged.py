"""An engine by itself, twice: as it is, and with every row in the batch through all layers."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.prompts import Request

if TYPE_CHECKING:
    from ndif_actor.messages import Group
    from ndif_client.wire.graph import Graph, Node

#: Tokens of the prompt of a sweep, and which of them is patched.
SWEEP_TOKENS, _PATCHED = 15, 4

#: The layer that steering strengths are swept at.
_STEERED = 10


class RaggedModel:
    """Passes over the same requests with and without leaving early and forking late.

    Args:
        folder: with safetensors weights and a tokenizer.
        dtype: "bfloat16", "float32", ...
    """

    def __init__(self, folder: str, dtype: str) -> None:
        from ndif_actor.engine.cpu import kernel_environment

        os.environ.update(kernel_environment(dtype))
        from ndif_actor.engine.engine import Engine
        from ndif_actor.engine.tokens import Tokenizer

        def load() -> Engine:
            return Engine.load(
                Path(folder), dtype=dtype, device="cpu", rank=0, world_size=1, cache_bytes=1 << 26
            )

        self._ragged, rigid = load(), load()
        rigid.blueprint.keep_rows()
        # What an engine knows of its layers it has learned when it was made.
        self._rigid = Engine(rigid._model, rigid.blueprint, 0, None, None, rigid.cache, {})
        self._tokenizer = Tokenizer.load(Path(folder))
        self._saved: list[Any] = []

    def num_layers(self) -> int:
        """Return how many decoder layers there are."""
        layers = self._ragged.blueprint.table.layers
        assert layers is not None, "this model keeps all rows in the batch"
        return layers.num_layers

    def load_test(self, requests: list[Request], how: str) -> float:
        """Run one user's request after another in one forward; return its seconds.

        Args:
            requests: each saves the output of one layer.
            how: "leaving" as the engine does it; "staying" until the last layer that anybody
                needs; "whole" through the whole model, logits included.
        """
        from bench.graphs import read_logits, save_layer

        graphs = [save_layer(request.layer, logits=False) for request in requests]
        if how == "whole":
            graphs = [read_logits(graph) for graph in graphs]
        ids = [self._tokenizer.encode(request.prompt) for request in requests]
        groups = [
            _group(number, [[own]], graph, sharing=number)
            for number, (own, graph) in enumerate(zip(ids, graphs, strict=True))
        ]
        return self._seconds(groups, ragged=how == "leaving")

    def patching(self, request: Request, *, ragged: bool) -> float:
        """Patch one clean prompt into a corrupted one at every layer, in one trace."""
        clean, corrupted = self._pair(request)
        nodes: list[Node] = []
        for layer in range(self.num_layers()):
            _patch(nodes, layer, invoke=layer + 1)
        from ndif_client.wire.graph import Graph

        invokes = [[clean], *([corrupted] for _ in range(self.num_layers()))]
        return self._seconds([_group(0, invokes, Graph(nodes), sharing=0)], ragged=ragged)

    def steering(self, request: Request, count: int, *, shared: bool) -> float:
        """Steer one prompt with many strengths, a request each; `shared` lets rows be shared."""
        ids, _ = self._pair(request)
        groups = [
            _group(number, [[ids]], _steer(number / count), sharing=0 if shared else number)
            for number in range(count)
        ]
        return self._seconds(groups, ragged=True)

    def ablating(self, request: Request, *, shared: bool) -> float:
        """Ablate the MLP of one layer after another, a request each."""
        ids, _ = self._pair(request)
        groups = [
            _group(layer, [[ids]], _ablate(layer), sharing=0 if shared else layer)
            for layer in range(self.num_layers())
        ]
        return self._seconds(groups, ragged=True)

    def apart(self, requests: list[Request]) -> float:
        """Return how far values saved both ways differ at most, relative to their size."""
        one, count = requests[0], len(requests)
        sides: list[list[Callable[[], float]]] = [
            [lambda how=how: self.load_test(requests, how) for how in ("leaving", "whole")],  # type: ignore[misc]
            [lambda on=on: self.patching(one, ragged=on) for on in (True, False)],  # type: ignore[misc]
            [lambda on=on: self.ablating(one, shared=on) for on in (True, False)],  # type: ignore[misc]
            [lambda on=on: self.steering(one, count, shared=on) for on in (True, False)],  # type: ignore[misc]
        ]
        largest = 0.0
        for runs in sides:
            values = []
            for run in runs:
                run()
                values.append(self._saved)
            for left, right in zip(*values, strict=True):
                largest = max(largest, float((left - right).norm() / right.norm()))
        return largest

    def _pair(self, request: Request) -> tuple[list[int], list[int]]:
        """Return a prompt of some length, and the same with another token in one place."""
        ids = (self._tokenizer.encode(request.prompt) * SWEEP_TOKENS)[:SWEEP_TOKENS]
        corrupted = list(ids)
        corrupted[_PATCHED] = ids[_PATCHED] + 1
        return ids, corrupted

    def _seconds(self, groups: Sequence[Group], *, ragged: bool) -> float:
        from ndif_actor.messages import RunPass
        from ndif_client.wire.tensors import import_array

        engine = self._ragged if ragged else self._rigid
        message = RunPass(sequence=1, layout="packed", groups=list(groups))
        # A full collection takes as long as a forward, and would fall into one of them.
        gc.collect()
        began = time.perf_counter()
        results, out = engine.run_pass(message, [], _memory)
        elapsed = time.perf_counter() - began
        faults = [result.fault for result in results if result.fault is not None]
        if faults:
            raise RuntimeError(f"a request failed: {faults[0].message}")
        tensors = [item.tensor for result in results for item in result.tensors]
        self._saved = [import_array(each, out[each.buffer], "torch").float() for each in tensors]
        return elapsed


def _group(number: int, invokes: list[list[list[int]]], graph: Graph, *, sharing: int) -> Group:
    from ndif_actor.messages import Group

    return Group(request=f"request-{number}", invokes=invokes, graph=graph, sharing=sharing)


def _patch(nodes: list[Any], layer: int, invoke: int) -> None:
    """Write the clean prompt's residual stream at one token after a layer; save the last logits."""
    from ndif_client.wire.graph import Apply, HookPoint, Items, ReadHook, Ref, Slice, WriteHook

    point, index = HookPoint(f"model.layers.{layer}", "output"), Items([Slice(), _PATCHED])
    start = len(nodes)
    nodes += [
        ReadHook(point, 0),
        Apply("getitem", [Ref(start), index]),
        ReadHook(point, invoke),
        Apply("setitem", [Ref(start + 2), index, Ref(start + 1)]),
        WriteHook(point, Ref(start + 3), invoke),
        *_last_logits(start + 5, invoke),
    ]


def _steer(strength: float) -> Graph:
    from ndif_client.wire.graph import Apply, Graph, HookPoint, ReadHook, Ref, WriteHook

    point = HookPoint(f"model.layers.{_STEERED}", "output")
    nodes: list[Node] = [ReadHook(point), Apply("add", [Ref(0), strength])]
    return Graph([*nodes, WriteHook(point, Ref(1)), *_last_logits(3, 0)])


def _ablate(layer: int) -> Graph:
    from ndif_client.wire.graph import Graph, HookPoint, WriteHook

    return Graph(
        [WriteHook(HookPoint(f"model.layers.{layer}.mlp", "output"), 0.0), *_last_logits(1, 0)]
    )


def _last_logits(start: int, invoke: int) -> list[Any]:
    from ndif_client.wire.graph import Apply, HookPoint, Items, ReadHook, Ref, Save, Slice

    return [
        ReadHook(HookPoint("lm_head", "output"), invoke),
        Apply("getitem", [Ref(start), Items([Slice(), -1])]),
        Save(Ref(start + 1)),
    ]


def _memory(num_bytes: int) -> memoryview:
    return memoryview(bytearray(num_bytes))
