"""The engine by itself, in a process of its own: packed forwards with no server around them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from bench.prompts import Request


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

    def together(self, requests: list[Request], logits: bool) -> float:
        """Run all requests in one forward; return its seconds.

        Args:
            requests: each saves the output of one layer.
            logits: each saves the logits of its last token too.
        """
        from bench.graphs import save_layer

        return self._seconds(requests, [save_layer(r.layer, logits) for r in requests])

    def touching(self, requests: list[Request], points: int, save: bool) -> float:
        """Run all requests in one whole forward; return its seconds.

        Args:
            requests: their layers don't matter.
            points: hook points that each reads besides the logits, evenly spread over the model.
            save: save one number at each.
        """
        from bench.graphs import touch

        sites = self._engine.blueprint.table.sites.values()
        inner = [s.point for s in sites if s.batch_axis is not None and s.point.path]
        chosen = [inner[i * len(inner) // points] for i in range(points)]
        return self._seconds(requests, [touch(chosen, save)] * len(requests))

    def _seconds(self, requests: list[Request], graphs: list[Any]) -> float:
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
        results, _ = self._engine.run_pass(message, [], _memory)
        elapsed = time.perf_counter() - began
        faults = [result.fault for result in results if result.fault is not None]
        if faults:
            raise RuntimeError(f"a request failed: {faults[0].message}")
        return elapsed


def _memory(num_bytes: int) -> memoryview:
    return memoryview(bytearray(num_bytes))
