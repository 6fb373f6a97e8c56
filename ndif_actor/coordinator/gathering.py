"""The saved values of one request, gathered from all the forwards it takes."""

from __future__ import annotations

from msgspec.structs import replace

from ndif_actor.coordinator.results import Memory
from ndif_actor.messages import GroupResult
from ndif_client.wire.frames import FrameLimits
from ndif_client.wire.messages import SavedTensor, SavedTuple
from ndif_client.wire.tensors import TensorSpec

#: Saved values up to this many bytes are copied: they would keep their neighbours' memory alive.
COPY_BYTES = 64 << 10

#: Buffers in one reply; clients accept no more in a frame.
MAX_BUFFERS = FrameLimits().max_buffers


class Gathered:
    """Values with the buffers they lie in, which are those of one frame.

    Attributes:
        tensors, tuples: what was saved; they point into `buffers`.
        memories: what the buffers lie in, held until `let_go`.
    """

    def __init__(self) -> None:
        self.tensors: list[SavedTensor] = []
        self.tuples: list[SavedTuple] = []
        self.buffers: list[memoryview] = []
        self.memories: list[Memory] = []

    def add(self, result: GroupResult, buffers: list[memoryview], memory: Memory) -> None:
        """Take in what one forward has made; its values lie in `buffers`, these in `memory`.

        Raises:
            ValueError: that makes more buffers than a frame has.
        """
        count = len(result.tensors) + sum(len(saved.items) for saved in result.tuples)
        if len(self.buffers) + count > MAX_BUFFERS:
            raise ValueError(
                f"{len(self.buffers) + count} tensors were saved; "
                f"one reply carries at most {MAX_BUFFERS}"
            )
        shared = False

        def take(spec: TensorSpec) -> TensorSpec:
            nonlocal shared
            buffer = buffers[spec.buffer]
            if buffer.nbytes <= COPY_BYTES:
                buffer = memoryview(bytes(buffer))
            else:
                shared = True
            self.buffers.append(buffer)
            return replace(spec, buffer=len(self.buffers) - 1)

        for tensor in result.tensors:
            self.tensors.append(replace(tensor, tensor=take(tensor.tensor)))
        for saved in result.tuples:
            self.tuples.append(replace(saved, items=[take(item) for item in saved.items]))
        if shared:
            memory.hold()
            self.memories.append(memory)

    def let_go(self) -> None:
        """Drop everything; whoever still needs the memories holds them."""
        for memory in self.memories:
            memory.drop()
        self.tensors, self.tuples, self.buffers, self.memories = [], [], [], []
