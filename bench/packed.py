"""The engine by itself, in a process of its own: packed forwards with no server around them."""

from __future__ import annotations

import gc
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from bench.prompts import Request
from ndif_client.wire.graph import HookPoint


class PackedModel:
    """An engine on the CPU, with the settings a shard gives it.

    Args:
        folder: with safetensors weights and a tokenizer.
        dtype: "bfloat16", "float32", ...
    """

    def __init__(self, folder: str, dtype: str) -> None:
        from ndif_actor.engine.cpu import kernel_environment

        os.environ.update(kernel_environment(dtype))
        from ndif_actor.engine.engine import Engine
        from ndif_actor.engine.tokens import Tokenizer

        self._engine = Engine.load(Path(folder), dtype=dtype, device="cpu", rank=0, world_size=1)
        self._tokenizer = Tokenizer.load(Path(folder))
        # As a shard does, or collections would run in the midst of a forward.
        gc.collect()
        gc.freeze()

    def together(self, requests: list[Request], logits: bool) -> float:
        """Run all requests in one forward; return its seconds.

        Args:
            requests: each saves the output of one layer.
            logits: each saves the logits of its last token too.
        """
        from bench.graphs import save_layer

        return self._seconds(requests, [save_layer(r.layer, logits) for r in requests])

    def places(self, count: int) -> list[tuple[str, str]]:
        """Return modules, each with "input" or "output", evenly spread over the model."""
        sites = self._engine.blueprint.table.sites.values()
        inner = [s.point for s in sites if s.batch_axis is not None and _is_of_a_module(s.point)]
        return [
            (point.path, point.port)
            for point in (inner[i * len(inner) // count] for i in range(count))
        ]

    def touching(self, requests: list[Request], places: list[tuple[str, str]], save: bool) -> float:
        """Run all requests in one whole forward; return its seconds.

        Args:
            requests: their layers don't matter.
            places: hook points that each reads besides the logits, some of `places`.
            save: save one number at each.
        """
        from bench.graphs import touch

        sites = self._engine.blueprint.table.sites
        by_place = {f"{p.path} {p.port}": p for p in sites if _is_of_a_module(p)}
        graph = touch([by_place[" ".join(place)] for place in places], save)
        return self._seconds(requests, [graph] * len(requests))

    def adapted(self, requests: list[Request], names: list[str], rank: int, how: str) -> float:
        """Run all requests in one whole forward, each with an adapter; return its seconds.

        Args:
            requests: their layers don't matter.
            names: the last part of the names of the linear modules that are adapted.
            rank: of the adapters.
            how: "none" of them has one; "as one" product for all; "one by one"; or "by hand", as
                operations of their own.
        """
        from bench.graphs import adapt
        from ndif_actor.engine import interleaver

        linear = [
            (path, module.in_features, module.out_features)
            for path, module in self._engine._model.model.named_modules()
            if path.rpartition(".")[2] in names
        ]
        places = [] if how == "none" else linear
        own = len(places) * 2
        graphs = [
            adapt(places, rank, number * own, by_hand=how == "by hand")
            for number in range(len(requests))
        ]
        memory = [
            memoryview(np.full(rank * size, 1e-3, np.float32).tobytes())
            for _, *sizes in places
            for size in sizes
        ]
        with ExitStack() as stack:
            if how == "one by one":
                nothing = mock.patch.object(interleaver, "compute_together", lambda asked: None)
                stack.enter_context(nothing)
            return self._seconds(requests, graphs, memory * len(requests))

    def _seconds(
        self, requests: list[Request], graphs: list[Any], buffers: list[memoryview] | None = None
    ) -> float:
        from ndif_actor.messages import Group, RunPass

        groups = [
            Group(
                request=f"request-{number}",
                invokes=[[self._tokenizer.encode(request.prompt)]],
                graph=graph,
                sharing=number,
            )
            for number, (request, graph) in enumerate(zip(requests, graphs, strict=True))
        ]
        began = time.perf_counter()
        message = RunPass(sequence=1, layout="packed", groups=groups)
        results, _ = self._engine.run_pass(message, buffers or [], _memory)
        elapsed = time.perf_counter() - began
        faults = [result.fault for result in results if result.fault is not None]
        if faults:
            raise RuntimeError(f"a request failed: {faults[0].message}")
        return elapsed


def _is_of_a_module(point: HookPoint) -> bool:
    """Whether it is the one tensor that a module takes or returns, which a hook sees too."""
    simple = point.leaf in ("", "args.0") and not point.operation and not point.call
    return simple and bool(point.path) and point.port in ("input", "output")


def _memory(num_bytes: int) -> memoryview:
    return memoryview(bytearray(num_bytes))
