"""The graph of one trace while it is being written: nodes, constants, the user's lines, saves.

The recorder knows nodes and their order in the forward; it knows nothing of Python operators
(`proxy`), of modules (`envoy`) or of the server (`transport`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import msgspec

from ndif_client.errors import ClosedTraceError, LimitError, OrderError, graph_error
from ndif_client.results import RESERVED_NAMES, Layout, Result, leaves, paths
from ndif_client.sources import source_at, user_frame
from ndif_client.wire.frames import FrameLimits
from ndif_client.wire.graph import (
    MAX_NODES,
    Argument,
    Constant,
    Graph,
    HookPoint,
    Invoke,
    Node,
    Parameter,
    ReadHook,
    Ref,
    Save,
    Source,
    WriteHook,
    references,
)
from ndif_client.wire.messages import HookInfo
from ndif_client.wire.tensors import TensorSpec, export_array

#: Order of values that need nothing from the forward.
_BEFORE_FORWARD = -1

#: Arrays of one trace: a frame has no more buffers.
_MAX_CONSTANTS = FrameLimits().max_buffers

#: Characters of a saved value's name.
_MAX_NAME = 256

_current: ContextVar[Recorder | None] = ContextVar("ndif_recorder", default=None)


class Recorder:
    """Collects the nodes of one trace in the order the user writes them.

    Attributes:
        invokes: the prompts, one entry an invoke.
        invoke: which of them reads and writes belong to now; None outside of all.
        buffers: the bytes of the constants, copied when they were recorded.
        names: what the saved values are called; a name may stand for a list or dict of them.
        result: what came back, once it has.
        failure: why nothing will come back.
    """

    def __init__(self) -> None:
        self.invokes: list[Invoke] = []
        self.invoke: int | None = None
        self.buffers: list[bytes] = []
        self.names: dict[str, Layout] = {}
        self.result: Result | None = None
        self.failure: BaseException | None = None
        self.closed_at: Source | None = None
        self._nodes: list[Node] = []
        self._at: list[int] = []
        self._orders: list[int] = []
        self._latest_reads: list[int | None] = []
        self._sources: list[Source] = []
        self._source_numbers: dict[tuple[str, int], int] = {}
        self._constants: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        self._parameters: dict[str, int] = {}
        self._saves: dict[int, int] = {}
        self._last_writes: dict[tuple[HookPoint, int], int] = {}

    # ------------------------------------------------------------ life

    @contextmanager
    def recording(self, invoke: int | None) -> Iterator[None]:
        """Within the block, reads and writes are recorded here, for that invoke."""
        previous, self_invoke = _current.get(), self.invoke
        _current.set(self)
        self.invoke = invoke
        try:
            yield
        finally:
            # Not by token: a notebook may leave the block in another context than it entered.
            _current.set(previous)
            self.invoke = self_invoke

    def close(self, at: Source) -> None:
        """Take no more nodes; `at` is the line that ended the trace."""
        self.closed_at = at

    def check_open(self) -> None:
        """Refuse to record after the end of the trace.

        Raises:
            ClosedTraceError: it has ended.
        """
        if self.closed_at is not None:
            raise graph_error(
                "this trace has ended, so nothing can be added to it; do this inside of its block, "
                "or, when it has run, on the saved `.value`",
                ClosedTraceError,
                other=self.closed_at,
            )

    # ------------------------------------------------------------ nodes

    def add(self, node: Node, order: int = _BEFORE_FORWARD) -> int:
        """Append a node and return its number; `order` is when its hook point fires.

        Raises:
            ClosedTraceError: the trace has ended.
            LimitError: the graph is full.
        """
        self.check_open()
        number = len(self._nodes)
        if number >= MAX_NODES:
            raise LimitError(
                f"a trace has at most {MAX_NODES} operations; split it into several traces"
            )
        latest = max(references(node), key=self._orders.__getitem__, default=None)
        if isinstance(node, ReadHook):
            latest_read: int | None = number
        else:
            latest_read = self._latest_reads[latest] if latest is not None else None
        if latest is not None:
            order = max(order, self._orders[latest])
        self._nodes.append(node)
        self._at.append(self._source())
        self._orders.append(order)
        self._latest_reads.append(latest_read)
        return number

    def read(self, hook: HookPoint, info: HookInfo) -> int:
        """Record a read for the current invoke and return the node's number."""
        return self.add(ReadHook(hook, self.here(str(hook))), info.order)

    def write(self, hook: HookPoint, info: HookInfo, value: Argument, invoke: int) -> int:
        """Record a write of an encoded value and return the node's number.

        Raises:
            OrderError: the value is made later in the forward than the hook point fires.
            GraphError: the hook point is read-only.
        """
        self.check_open()
        if not info.dtype.startswith(("float", "bfloat", "complex")):
            raise graph_error(
                f"{hook} holds {info.dtype} and is read-only; to change what the model sees, "
                "write the output of its embedding",
                hook=str(hook),
            )
        if isinstance(value, Ref) and self._orders[value.node] > info.order:
            self._refuse_late(hook, value.node)
        number = self.add(WriteHook(hook, value, invoke), info.order)
        self._last_writes[hook, invoke] = number
        return number

    def last_write(self, hook: HookPoint, invoke: int) -> int | None:
        """Return the number of the last write at a hook point, if there was one."""
        return self._last_writes.get((hook, invoke))

    def was_just_written(self, hook: HookPoint, invoke: int, node: int) -> bool:
        """Whether `node` is the value that was written last at this hook point."""
        number = self._last_writes.get((hook, invoke))
        if number is None:
            return False
        write = self._nodes[number]
        return isinstance(write, WriteHook) and write.value == Ref(node)

    @property
    def has_writes(self) -> bool:
        """Whether any hook point is written."""
        return bool(self._last_writes)

    def constant(self, value: Any) -> Ref:
        """Record a copy of an array or tensor; equal ones are sent once.

        Raises:
            TypeError: it has a dtype that can't be sent.
        """
        name, shape, raw = export_array(value)
        data = bytes(raw)
        known = self._constants.setdefault((name, shape), [])
        for number in known:
            node = self._nodes[number]
            assert isinstance(node, Constant)
            if self.buffers[node.tensor.buffer] == data:
                return Ref(number)
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
        return Ref(number)

    def parameter(self, path: str) -> int:
        """Record a parameter, once."""
        if path not in self._parameters:
            self._parameters[path] = self.add(Parameter(path))
        return self._parameters[path]

    def save(self, node: int) -> int:
        """Record that a value is to be sent back, once; return the number of the save."""
        if node not in self._saves:
            self._saves[node] = self.add(Save(Ref(node)))
        return self._saves[node]

    def name(self, name: str, saved: Layout, *, replace: bool = False) -> None:
        """Give saved values a name.

        Raises:
            GraphError: the name is taken and not to be replaced, or can't be one.
        """
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
            raise graph_error(f"a name has 1 to {_MAX_NAME} characters, not {name!r:.80}")
        if name in RESERVED_NAMES:
            raise graph_error(f"every result has its own {name!r}; choose another name")
        if name in self.names and not replace and self.names[name] != saved:
            first = min(leaves(self.names[name]))
            raise graph_error(
                f"the name {name!r} is already that of another saved value",
                other=self._sources[self._at[first]],
            )
        self.names[name] = saved

    # ------------------------------------------------------------ what was recorded

    def here(self, what: str) -> int:
        """Return the current invoke.

        Raises:
            ClosedTraceError: we are in no invoke.
        """
        self.check_open()
        if self.invoke is None:
            raise graph_error(
                f"{what}: which prompt is meant? Use `with trace.invoke(prompt):` around it, or "
                "give the prompt to session.trace(...)",
                ClosedTraceError,
            )
        return self.invoke

    def source_of(self, node: int) -> Source:
        """Return the user's line that made a node."""
        return self._sources[self._at[node]]

    def saves(self) -> list[int]:
        """Return the numbers of all saves, in order."""
        return list(self._saves.values())

    def graph(self) -> Graph:
        """Return the graph, its saves named."""
        nodes = list(self._nodes)
        for name, layout in self.names.items():
            for path, number in paths(layout, name):
                save = nodes[number]
                assert isinstance(save, Save)
                nodes[number] = Save(save.value, path[:_MAX_NAME])
        return Graph(nodes, list(self._sources), list(self._at))

    def _refuse_late(self, hook: HookPoint, node: int) -> None:
        read = self._latest_reads[node]
        assert read is not None
        culprit = self._nodes[read]
        assert isinstance(culprit, ReadHook)
        raise graph_error(
            f"{hook} is written with a value that needs {culprit.hook}, which the model reaches "
            "only afterwards",
            OrderError,
            other=self.source_of(read),
            hook=str(hook),
        )

    def _source(self) -> int:
        """Return the number of the user's current line."""
        frame = user_frame()
        key = ("<unknown>", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)
        number = self._source_numbers.get(key)
        if number is None:
            number = self._source_numbers[key] = len(self._sources)
            self._sources.append(Source(*key) if frame is None else source_at(*key, frame))
        return number


def current_recorder(what: str) -> Recorder:
    """Return the recorder of the trace that is open here.

    Raises:
        ClosedTraceError: none is.
    """
    recorder = _current.get()
    if recorder is None:
        raise graph_error(
            f"{what} means something only inside of a trace: "
            "`async with session.trace(prompt) as trace:`",
            ClosedTraceError,
        )
    recorder.check_open()
    return recorder
