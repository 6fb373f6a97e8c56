"""Edits: changes of the model that are recorded once and apply to every later trace.

    with session.edit("quiet") as edit:
        session.model.layers[3].mlp.output *= 0
    session.edits.add(edit)              every later trace and generation of this session has it
    edited = session.with_edits(edit)    or: only those of this other handle have it
    edit.save("quiet.ndif-edit")         and Edit.load(...) on another day

An edit is a graph like a trace's, stored. Its nodes come first in each invoke, so what is read
later sees it; in a generation it applies at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from ndif_client.errors import NdifError, UnknownNameError, graph_error
from ndif_client.held import Handle, Holder
from ndif_client.operations import Operations
from ndif_client.recorder import Recorder
from ndif_client.sources import capture
from ndif_client.steps import PREFILL_BLOCK, Block
from ndif_client.wire.frames import FrameError, FrameLimits, encode_frame, split_frame
from ndif_client.wire.graph import (
    Constant,
    Graph,
    Held,
    HookPoint,
    Invoke,
    Parameter,
    ReadHook,
    Steps,
    WriteHook,
    renumbered,
)
from ndif_client.wire.messages import HookInfo, ModelTree, ModuleInfo
from ndif_client.wire.tensors import check_buffer

#: Of the files.
FORMAT = "ndif-edit/1"


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    format: str
    name: str
    model: str
    graph: Graph


class Edit:
    """A named change of a model. Made by `session.edit(name)` or `Edit.load(file)`.

    Attributes:
        name: what it is called.
        model: the id of the model it was written for; others that have its hook points will do.
    """

    def __init__(self, name: str, model: str, graph: Graph, buffers: list[bytes]) -> None:
        self.name = name
        self.model = model
        self._graph = graph
        self._buffers = buffers
        #: the held values that it uses, by name
        self._handles: dict[str, Handle] = {}

    def save(self, file: str | Path) -> None:
        """Write it to a file, which holds no code.

        Raises:
            NdifError: it uses values that only the server holds.
        """
        if self._handles:
            raise NdifError(
                f"the edit {self.name!r} uses values held on the server; fetch them "
                f"({', '.join(self._handles)}), and record it with what you get"
            )
        header = _Header(format=FORMAT, name=self.name, model=self.model, graph=self._graph)
        parts = encode_frame(msgspec.msgpack.encode(header), self._buffers)
        Path(file).write_bytes(b"".join(bytes(part) for part in parts))

    @classmethod
    def load(cls, file: str | Path) -> Edit:
        """Read one from a file.

        Raises:
            NdifError: the file holds none.
        """
        try:
            frame = split_frame(Path(file).read_bytes(), FrameLimits())
            header = msgspec.msgpack.decode(frame.header, type=_Header)
            buffers = [bytes(buffer) for buffer in frame.buffers]
            for node in header.graph.nodes:
                if isinstance(node, Constant):
                    check_buffer(node.tensor, [memoryview(buffer) for buffer in buffers])
        except (FrameError, msgspec.DecodeError, ValueError) as error:
            raise NdifError(f"{file} holds no edit: {error}") from error
        if header.format != FORMAT:
            raise NdifError(f"{file} is of format {header.format!r}; this version reads {FORMAT}")
        return cls(header.name, header.model, header.graph, buffers)

    def play(self, recorder: Recorder, invoke: int, tree: ModelTree) -> None:
        """Record it again, as the first thing in an invoke of a trace.

        Raises:
            UnknownNameError: the model has no such hook point.
        """
        block = Block(Steps(), as_list=True) if recorder.generates else PREFILL_BLOCK
        with recorder.recording(invoke), recorder.again(block):
            try:
                _Player(self, recorder, tree).play()
            except LookupError as error:  # a file that somebody has changed by hand
                raise NdifError(f"the edit {self.name!r} refers to what is not in it") from error

    def __repr__(self) -> str:
        return f"Edit({self.name!r}, {len(self._graph.nodes)} operations, for {self.model!r})"


class EditRecording(AbstractContextManager[Edit]):
    """The block in which an edit is recorded."""

    def __init__(self, name: str, tree: ModelTree, holder: Holder) -> None:
        if not isinstance(name, str) or not name:
            raise graph_error(f"an edit has a name, not {name!r:.80}")
        self._edit = Edit(name, tree.id, Graph(), [])
        self._recorder = Recorder(holder=holder, edits=True)
        self._recorder.invokes.append(Invoke(["the prompt of each trace"]))
        self._block = self._recorder.recording(0)

    def __enter__(self) -> Edit:
        self._block.__enter__()
        return self._edit

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._block.__exit__(kind, error, traceback)
        self._recorder.close(capture())
        if error is not None:
            return
        if not self._recorder.has_effects:
            raise graph_error(f"the edit {self._edit.name!r} changes nothing: write something")
        self._edit._graph = self._recorder.graph()
        self._edit._buffers = list(self._recorder.buffers)
        self._edit._handles = dict(self._recorder.used)


class Edits:
    """The edits that apply to all traces of a session, in this order."""

    def __init__(self, edits: tuple[Edit, ...] = ()) -> None:
        self._edits: dict[str, Edit] = {}
        for edit in edits:
            self.add(edit)

    def add(self, edit: Edit) -> None:
        """Let an edit apply from now on; one of the same name is replaced."""
        if not isinstance(edit, Edit) or not edit._graph.nodes:
            raise graph_error(f"{edit!r:.80} is no recorded edit")
        self._edits.pop(edit.name, None)
        self._edits[edit.name] = edit

    def remove(self, name: str | Edit) -> None:
        """Let it apply no more.

        Raises:
            KeyError: none of that name does.
        """
        key = name.name if isinstance(name, Edit) else name
        if key not in self._edits:
            raise KeyError(f"no edit {key!r} applies; those that do: {list(self._edits)}")
        del self._edits[key]

    def clear(self) -> None:
        """Let none apply any more."""
        self._edits.clear()

    def __iter__(self) -> Iterator[Edit]:
        return iter(list(self._edits.values()))

    def __len__(self) -> int:
        return len(self._edits)

    def __contains__(self, name: object) -> bool:
        return name in self._edits or name in self._edits.values()

    def __repr__(self) -> str:
        return f"Edits({list(self._edits)})"


class _Player:
    """Records the nodes of an edit into a trace."""

    def __init__(self, edit: Edit, recorder: Recorder, tree: ModelTree) -> None:
        self._edit = edit
        self._recorder = recorder
        self._infos = _infos(tree)
        self._numbers: dict[int, int] = {}
        self._conditions = {0: recorder.guards.now}

    def play(self) -> None:
        graph = self._edit._graph
        for number, node in enumerate(graph.nodes):
            source = graph.source_of(number)
            under = graph.under[number] if graph.under else 0
            with (
                self._recorder.lines.given(source),
                self._recorder.guards.under(self._condition(under)),
            ):
                self._numbers[number] = self._record(node)

    def _record(self, node: Any) -> int:
        recorder = self._recorder
        match node:
            case Constant(tensor=spec):
                data = self._edit._buffers[spec.buffer]
                return recorder.constant_bytes(spec.dtype, tuple(spec.shape), data)
            case Parameter(path=path):
                return recorder.parameter(path)
            case Held(name=name):
                handle = self._edit._handles[name]
                if handle._holder is not recorder.holder:
                    raise graph_error(
                        f"the edit {self._edit.name!r} uses a value that another session holds"
                    )
                return recorder.held(handle)
            case ReadHook(hook=hook):
                return recorder.read(hook, self._info(hook))
            case WriteHook(hook=hook):
                moved = renumbered(node, self._numbers.__getitem__)
                invoke = recorder.here(str(hook))
                return recorder.write(hook, self._info(hook), moved.value, invoke)
            case _:
                return recorder.add(renumbered(node, self._numbers.__getitem__))

    def _condition(self, under: int) -> int:
        if under not in self._conditions:
            condition = self._edit._graph.conditions[under - 1]
            outer = self._condition(condition.outer)
            value = self._numbers[condition.value]
            self._conditions[under] = self._recorder.guards.add(value, condition.negated, outer)
        return self._conditions[under]

    def _info(self, hook: HookPoint) -> HookInfo:
        info = self._infos.get(hook)
        if info is None:
            raise graph_error(
                f"the edit {self._edit.name!r}, written for {self._edit.model!r}, uses {hook}, "
                "which this model does not have",
                UnknownNameError,
                hook=str(hook),
            )
        return info


def _infos(tree: ModelTree) -> dict[HookPoint, HookInfo]:
    found: dict[HookPoint, HookInfo] = {}

    def visit(module: ModuleInfo, path: str) -> None:
        for info in module.hooks:
            found[HookPoint(path, info.port, info.leaf, info.call)] = info
        if module.forward is not None:
            forward = tree.forwards[module.forward]
            for operation in Operations(forward, path, module.first_order).all():
                for info in operation._hook_infos:
                    hook = HookPoint(path, info.port, info.leaf, info.call, info.operation)
                    found[hook] = info
        for child in module.children:
            visit(child, f"{path}.{child.name}" if path else child.name)

    visit(tree.root, "")
    return found
