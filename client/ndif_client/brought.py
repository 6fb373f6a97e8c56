"""What a trace brings along or finds on the server: arrays, parameters, held values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from ndif_client.errors import LimitError, graph_error
from ndif_client.nodes import Nodes
from ndif_client.wire.frames import FrameLimits
from ndif_client.wire.graph import Apply, Constant, Held, Keep, Parameter, Ref
from ndif_client.wire.tensors import TensorSpec, export_array

if TYPE_CHECKING:
    from ndif_client.held import Handle

#: Arrays of one trace: a frame has no more buffers.
_MAX_CONSTANTS = FrameLimits().max_buffers


class Brought(Nodes):
    """The part of a recorder that knows constants, parameters and held values.

    Attributes:
        buffers: the bytes of the constants, copied when they were recorded.
        used, kept: handles of the held values that it uses, and of those that it keeps, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[bytes] = []
        self.used: dict[str, Handle] = {}
        self.kept: dict[str, Handle] = {}
        self._constants: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        self._parameters: dict[str, int] = {}
        self._held: dict[str, int] = {}
        self._keeps: dict[str, int] = {}
        #: for each name, the nodes that keep something as that, and what
        self._kept_as: dict[str, list[tuple[int, int]]] = {}

    def constant(self, value: Any) -> Ref:
        """Record a copy of an array or tensor; equal ones are sent once.

        Raises:
            TypeError: it has a dtype that can't be sent.
        """
        name, shape, raw = export_array(value)
        return Ref(self.constant_bytes(name, shape, bytes(raw)))

    def constant_bytes(self, name: str, shape: tuple[int, ...], data: bytes) -> int:
        """Record an array given by dtype, shape and bytes; return the node's number."""
        known = self._constants.setdefault((name, shape), [])
        for number in known:
            node = self._nodes[number]
            assert isinstance(node, Constant)
            if self.buffers[node.tensor.buffer] == data:
                return number
        if len(self.buffers) >= _MAX_CONSTANTS:
            raise LimitError(
                f"a trace brings at most {_MAX_CONSTANTS} arrays along; stack them into fewer"
            )
        spec = msgspec.convert(
            {"dtype": name, "shape": shape, "buffer": len(self.buffers)}, TensorSpec
        )
        number = self.add(Constant(spec))
        self.buffers.append(data)
        known.append(number)
        return number

    def parameter(self, path: str) -> int:
        """Record a parameter, once."""
        if path not in self._parameters:
            self._parameters[path] = self.add(Parameter(path))
        return self._parameters[path]

    def held(
        self, handle: Handle, otherwise: int | None = None, *, before: int | None = None
    ) -> int:
        """Record that a held value is used, once; what this trace keeps is used as it is here.

        Args:
            handle: of the value.
            otherwise: number of the node that stands for it where nothing is held.
            before: number of a node; what the trace has kept after that is passed over.
        """
        name = handle.name
        for keep, value in reversed(self._kept_as.get(name, [])):
            if before is None or keep < before:
                return value
        if name not in self._held:
            begin = None if otherwise is None else Ref(otherwise)
            self._held[name] = self.add(Held(name, begin))
            self.used[name] = handle
        return self._held[name]

    def keep(self, node: int, name: str) -> None:
        """Record that a value is to be held on the server as `name`, when all has gone well.

        Of a value that is made at several steps, that of the last is held.

        Raises:
            GraphError: it is made in an edit or in some cases only.
        """
        if self.edits:
            raise graph_error("nothing stays from an edit, so nothing can be kept in it")
        if self.guards.of[node] or self.guards.now:
            raise graph_error(
                "what is kept must be made in any case, so it can't be kept in a `when` block; "
                "keep what trace.choose(...) gives"
            )
        number = self.add(Keep(Ref(node), name), block=self._blocks[node])
        if name in self._keeps:
            # The last one counts, as with a variable; the node of the other comes to nothing.
            earlier = self._nodes[self._keeps[name]]
            assert isinstance(earlier, Keep)
            self._nodes[self._keeps[name]] = Apply("detach", [earlier.value])
        self._keeps[name] = number
        self._kept_as.setdefault(name, []).append((number, node))
