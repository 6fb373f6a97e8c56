"""One group's program while a forward runs: its values, its rows, and its failure if it fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ndif_actor.engine import ops, shapes
from ndif_actor.engine.batch import Rows, padding_mask
from ndif_actor.engine.hookpoints import MASK
from ndif_actor.engine.moments import Moment
from ndif_actor.engine.program import BEFORE_FORWARD, Program
from ndif_actor.engine.sharded import ShardedModel
from ndif_client.wire.catalogue import CATALOGUE
from ndif_client.wire.graph import (
    Apply,
    CallModule,
    Constant,
    Node,
    Parameter,
    ReadHook,
    Ref,
    Save,
    WriteHook,
)
from ndif_client.wire.messages import Fault
from ndif_client.wire.tensors import check_buffer, import_array

if TYPE_CHECKING:
    from ndif_actor.engine.interleaver import LiveMoment

#: Called with the node, its number and its value.
Saved = Callable[[Save, int, ops.Value], None]

#: After these the device, not the request, is in trouble.
_FATAL = (torch.OutOfMemoryError, torch.AcceleratorError)


class Execution:
    """Runs one program on its own rows, step after step.

    Args:
        program: what to run.
        model: this rank's shard.
        buffers: the bytes of the program's constants, valid during the first pass.
        infer: gives the meta value of each node at a step; asked only after a failure.
    """

    def __init__(
        self,
        program: Program,
        model: ShardedModel,
        buffers: list[memoryview],
        infer: Callable[[int], Mapping[int, Any]],
    ) -> None:
        self.program = program
        self.fault: Fault | None = None
        self.step = 0
        self.plan = program.at(0)
        self.pause_hooks: Callable[[], AbstractContextManager[None]] = nullcontext
        self._model = model
        self._buffers = buffers
        self._infer = infer
        self._shapes: Mapping[int, Any] | None = None
        self._values: dict[int, Any] = {}
        self._rows: Sequence[Rows] = ()
        self._save: Saved

    def join(self, rows: Sequence[Rows], save: Saved) -> None:
        """Take part in a pass.

        Args:
            rows: of each invoke.
            save: called with each saved value, which it must copy at once.
        """
        self._rows, self._save = rows, save

    def begin(self) -> None:
        """Run the nodes of this step that need nothing from the forward."""
        self.run(BEFORE_FORWARD, None)

    def next_step(self) -> None:
        """Go on to the next step of a generation; only kept values live on."""
        self.step += 1
        self.plan = self.program.at(self.step)
        kept = self.program.kept
        for number in list(self._values):
            last = kept.get(number, -1)
            if last is not None and last < self.step:
                del self._values[number]
        self._shapes = None

    def run(self, order: int, moment: LiveMoment | None) -> None:
        """Run the nodes of one moment of the forward."""
        made: list[int] = []
        for number in self.plan.nodes.get(order, ()):
            node = self.program.graph.nodes[number]
            if self.fault is not None:
                self._keep_in_step(number, node, moment)
                continue
            try:
                value = self._run(number, node, moment)
            except _FATAL:
                raise
            except ops.REFUSALS as error:
                self._fail(number, node, error)
                continue
            if value is not None:
                self._values[number] = value
                made.append(number)
            for dead in self.plan.dies.get(number, ()):
                self._values.pop(dead, None)
        self._own(made)

    def _run(self, number: int, node: Node, moment: LiveMoment | None) -> Any:
        match node:
            case ReadHook():
                return self._read(node, moment)
            case WriteHook():
                self._write(node, moment)
                return None
            case Apply(op=name):
                args, kwargs = shapes.arguments(node, self._values.__getitem__)
                return ops.apply(CATALOGUE[name], args, kwargs, self._model.device)
            case CallModule():
                args, kwargs = shapes.arguments(node, self._values.__getitem__)
                with self.pause_hooks():
                    return self._model.call(node.path, args, kwargs)
            case Parameter(path=path):
                return self._model.parameter(path)
            case Constant(tensor=spec):
                array = import_array(spec, check_buffer(spec, self._buffers), "torch")
                return array.to(self._model.device)
            case Save(value=Ref(node=saved)):
                self._save(node, number, self._values[saved])
                return None

    def _own(self, made: list[int]) -> None:
        """Copy what outlives this moment: it may be a view of the batch the model goes on with."""
        for number in made:
            node = self.program.graph.nodes[number]
            # A parameter stays as it is; a constant lies in memory that this pass will give back.
            lasts = isinstance(node, Parameter)
            lasts |= isinstance(node, Constant) and number not in self.program.kept
            if number in self.plan.outlives and not lasts:
                self._values[number] = _copied(self._values[number])

    def _read(self, node: ReadHook, moment: LiveMoment | None) -> torch.Tensor:
        assert moment is not None
        rows = self._rows[node.invoke]
        if node.hook == MASK:
            return padding_mask(rows.lengths, self._model.device)
        site = self.program.sites[node.hook]
        mine = self._model.whole(node.hook, rows.read(moment.tensor(node.hook.leaf), site))
        return mine.clone() if moment.is_written(node.hook.leaf) else mine

    def _write(self, node: WriteHook, moment: LiveMoment | None) -> None:
        assert moment is not None
        site = self.program.sites[node.hook]
        rows = self._rows[node.invoke]
        value = ops.resolve(node.value, self._values.__getitem__)
        shape = site.shape_for(len(rows.lengths), max(rows.lengths))
        whole = torch.as_tensor(value, device=self._model.device).expand(shape)
        target = moment.writable(node.hook.leaf)
        rows.write(target, site, self._model.slice(node.hook, whole))

    def miss(self, moment: Moment) -> None:
        """Fail, because the forward is over and this moment did not come."""
        if self.fault is not None:
            return
        graph = self.program.graph
        for number in self.program.nodes_at(self.step):
            node = graph.nodes[number]
            if isinstance(node, ReadHook | WriteHook) and Moment.of(node.hook) == moment:
                self._refuse(number, node, f"{node.hook}: the model did not run it in this forward")
                return

    def _fail(self, number: int, node: Node, error: Exception) -> None:
        self._refuse(number, node, shapes.failure(node, error))

    def _refuse(self, number: int, node: Node, message: str) -> None:
        graph = self.program.graph
        self.fault = Fault(
            kind="execution",
            message=message,
            node=number,
            hook=str(node.hook) if isinstance(node, ReadHook | WriteHook) else None,
            source=graph.source_of(number),
        )
        self._values.clear()

    def _keep_in_step(self, number: int, node: Node, moment: LiveMoment | None) -> None:
        """Join the collectives of a node whose group has failed, with values that mean nothing."""
        if not self._model.is_sharded:
            return
        if isinstance(node, ReadHook) and node.hook != MASK:
            self._read(node, moment)
        elif isinstance(node, Parameter):
            self._model.parameter(node.path)
        elif isinstance(node, CallModule):
            if self._shapes is None:
                self._shapes = self._infer(self.step)
            known = self._shapes
            args, kwargs = shapes.arguments(node, lambda n: _zeros(known[n], self._model.device))
            with self.pause_hooks():
                self._model.call(node.path, args, kwargs)


def _copied(value: Any) -> Any:
    return tuple(map(_copied, value)) if isinstance(value, tuple) else value.clone()


def _zeros(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_zeros(item, device) for item in value)
    return torch.zeros(value.shape, dtype=value.dtype, device=device)
