"""Saved values on their way out: copied once, at the moment of saving, into memory to be sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch

from ndif_actor.engine.ops import Value
from ndif_client.wire.catalogue import CATALOGUE
from ndif_client.wire.graph import Apply, Graph, Save
from ndif_client.wire.messages import SavedTensor, SavedTuple
from ndif_client.wire.tensors import TensorSpec

Allocate = Callable[[int], memoryview]


class SaveBuffers:
    """The buffers of one pass, filled in the order values are saved."""

    def __init__(self, allocate: Allocate) -> None:
        self.buffers: list[memoryview] = []
        self._allocate = allocate

    def put(self, value: torch.Tensor) -> TensorSpec:
        """Copy a value and return where it lies."""
        memory = self._allocate(value.numel() * value.element_size())
        if value.numel():
            target = torch.frombuffer(memory, dtype=value.dtype).view(value.shape)
            target.copy_(value)
        self.buffers.append(memory)
        name = str(value.dtype).removeprefix("torch.")
        # The names of wire dtypes are torch's own.
        return TensorSpec(cast(Literal["float32"], name), tuple(value.shape), len(self.buffers) - 1)


class GroupSaves:
    """What one group has saved in one pass, at one step."""

    def __init__(self, graph: Graph, step: int, buffers: SaveBuffers) -> None:
        self.tensors: list[SavedTensor] = []
        self.tuples: list[SavedTuple] = []
        self._graph = graph
        self._step = step
        self._buffers = buffers

    def __call__(self, node: Save, number: int, value: Value) -> None:
        """Copy the value that `node`, the graph's node of that number, saves."""
        if isinstance(value, torch.Tensor):
            saved = self._buffers.put(value)
            self.tensors.append(SavedTensor(number, node.name, saved, self._step))
            return
        items = [self._buffers.put(item) for item in value]
        self.tuples.append(SavedTuple(number, node.name, self._fields(node), items, self._step))

    def _fields(self, node: Save) -> list[str]:
        made_by = self._graph.nodes[node.value.node]
        return list(CATALOGUE[made_by.op].fields) if isinstance(made_by, Apply) else []
