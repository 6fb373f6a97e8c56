"""One group's program while a forward runs: its values, its rows, and its failure if it fails."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch

from ndif_actor.engine import ops, shapes
from ndif_actor.engine.backward import BackwardPlan
from ndif_actor.engine.batch import Rows, padding_mask
from ndif_actor.engine.held import Holdings
from ndif_actor.engine.hookpoints import MASK, Site
from ndif_actor.engine.low_rank import LowRank
from ndif_actor.engine.moments import Moment
from ndif_actor.engine.program import BEFORE_FORWARD, Program
from ndif_actor.engine.sharded import ShardedModel
from ndif_client.wire.catalogue import CATALOGUE
from ndif_client.wire.graph import (
    Apply,
    Backward,
    CallModule,
    Choose,
    Constant,
    EndGeneration,
    Held,
    Keep,
    Log,
    Node,
    Parameter,
    ReadGradient,
    ReadHook,
    Ref,
    Save,
    WriteGradient,
    WriteHook,
    references,
)
from ndif_client.wire.messages import Fault
from ndif_client.wire.tensors import check_buffer, import_array

if TYPE_CHECKING:
    from ndif_actor.engine.interleaver import LiveMoment

#: Called with the node, its number and its value.
Saved = Callable[[Save, int, ops.Value], None]

#: Called with the node's number and a line of text.
Logged = Callable[[int, str], None]

#: Lines that one request may log, and characters of each.
MAX_LINES = 10_000
_MAX_LINE = 4096

#: After these the device, not the request, is in trouble.
_FATAL = (torch.OutOfMemoryError, torch.AcceleratorError)


class Flow(NamedTuple):
    """A tensor of the model that holds the rows of a value, whose gradient is that of these."""

    tensor: torch.Tensor
    rows: Rows
    site: Site
    model: ShardedModel

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return these rows of the tensor, or of its gradient, as the user sees them."""
        return self.model.whole(self.site.point, self.rows.read(tensor, self.site))

    def with_value(self, gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the tensor, with another one of the value in it."""
        changed = gradient.clone()
        self.rows.write(changed, self.site, self.model.slice(self.site.point, value))
        return changed


class Differentiated(NamedTuple):
    """A backward's loss, the gradient it begins with, if not 1, and the values it is for."""

    loss: torch.Tensor
    gradient: torch.Tensor | None
    watched: list[torch.Tensor | Flow]


class Execution:
    """Runs one program on its own rows, step after step.

    Args:
        program: what to run.
        model: this rank's shard.
        buffers: the bytes of the program's constants, valid during the first pass.
        holdings: the held values that it uses and keeps.
        seed: of its random operations.
        infer: gives the meta value of each node at a step; asked only after a failure.

    Attributes:
        fault: why it has failed, if it has.
        has_ended: whether it has asked for its generation to end.
    """

    def __init__(
        self,
        program: Program,
        model: ShardedModel,
        buffers: list[memoryview],
        holdings: Holdings,
        seed: int,
        infer: Callable[[int], Mapping[int, Any]],
    ) -> None:
        self.program = program
        self.holdings = holdings
        self.fault: Fault | None = None
        self.has_ended = False
        self.step = 0
        self.plan = program.at(0)
        self.pause_hooks: Callable[[], AbstractContextManager[None]] = nullcontext
        self._generator = torch.Generator().manual_seed(seed)
        self._model = model
        self._buffers = buffers
        self._infer = infer
        self._shapes: Mapping[int, Any] | None = None
        self._values: dict[int, Any] = {}
        self._gradients: dict[tuple[int, int], torch.Tensor] = {}
        self._flows: dict[int, Flow] = {}
        #: nodes that need gradients which have not come yet, though a later one has; while there
        #: may be such, no value is dropped
        self._waiting: list[int] = []
        self._hoards = False
        self._decisions: dict[int, bool] = {}
        self._differentiated: tuple[torch.Tensor, torch.Tensor | None]
        self._rows: Sequence[Rows] = ()
        self._save: Saved
        self._log: Logged
        self._lines = 0

    def join(self, rows: Sequence[Rows], save: Saved, log: Logged) -> None:
        """Take part in a pass.

        Args:
            rows: of each invoke.
            save: called with each saved value, which it must copy at once.
            log: called with each line that is logged.
        """
        self._rows, self._save, self._log = rows, save, log

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
        for _ in self.course(order, moment):
            pass

    def course(self, order: int, moment: LiveMoment | None) -> Iterator[LowRank | None]:
        """Run the nodes of one moment, and stop at what can be computed along with other groups'.

        Where the others stop is the same on all shards: a group that has failed stops too.
        """
        return self._course(self.plan.nodes.get(order, ()), moment)

    def _course(
        self, numbers: Iterable[int], moment: LiveMoment | None
    ) -> Iterator[LowRank | None]:
        made: list[int] = []
        for number in numbers:
            node = self.program.graph.nodes[number]
            if self.fault is not None:
                self._keep_in_step(number, node, moment)
                if _is_low_rank(node):
                    yield None
                continue
            try:
                if not self._holds(number):
                    self._leave_out(number)
                    continue
                if _is_low_rank(node):
                    args, kwargs = shapes.arguments(node, self._values.__getitem__)
                    update = LowRank(*args, **kwargs)
                    yield update
                    value: Any = update.result()
                else:
                    value = self._run(number, node, moment)
                if number in self.plan.watched and not isinstance(node, ReadHook):
                    value = _watched(value)
                if number in self.program.conditions.deciding:
                    self._decisions[number] = bool(self._model.agreed(value.detach() != 0))
            except _FATAL:
                raise
            except ops.REFUSALS as error:
                self._fail(number, node, error)
                continue
            if value is not None:
                self._values[number] = value
                made.append(number)
            self._bury(number)
        self._own(made)

    def _holds(self, number: int) -> bool:
        """Whether a node runs, for all that is known; its outer conditions have been asked."""
        decision = self.program.conditions.innermost.get(number)
        return decision is None or self._decisions.get(decision.node) == (not decision.negated)

    def _leave_out(self, number: int) -> None:
        self._values.pop(number, None)
        self._decisions.pop(number, None)
        self._bury(number)

    def _bury(self, number: int) -> None:
        """Drop the values that a node was the last to need."""
        if self._hoards:
            return
        for dead in self.plan.dies.get(number, ()):
            self._values.pop(dead, None)

    def _run(self, number: int, node: Node, moment: LiveMoment | None) -> Any:
        match node:
            case ReadHook():
                if number in self.plan.watched:
                    self._model.check_gradient(node.hook)
                    flow = self._flow(node, moment)
                    if flow is not None:
                        self._flows[number] = flow
                        return flow.value(flow.tensor).clone()
                mine = self._read(node, moment)
                if number in self.plan.watched:
                    # The model goes on with this very value, so that its gradient is the whole one.
                    mine = _watched(mine)
                    self._put(node, moment, mine)
                return mine
            case WriteHook():
                value = ops.resolve(node.value, self._values.__getitem__)
                self._put(node, moment, torch.as_tensor(value, device=self._model.device))
                return None
            case ReadGradient(backward=backward, of=of):
                return self._gradients[backward, of.node]
            case WriteGradient(backward=backward, of=of, value=given):
                key = backward, of.node
                value = ops.resolve(given, self._values.__getitem__)
                changed = torch.as_tensor(value, device=self._model.device)
                replaced = torch.empty_like(self._gradients[key])
                self._gradients[key] = replaced.copy_(changed.detach())
                return None
            case Choose(condition=condition, then=then, otherwise=otherwise):
                return self._values[(then if self._decisions[condition.node] else otherwise).node]
            case Backward(loss=loss, gradient=gradient):
                begins_with = None if gradient is None else self._values[gradient.node]
                self._differentiated = self._values[loss.node], begins_with
                return None
            case Apply(op=name):
                args, kwargs = shapes.arguments(node, self._values.__getitem__)
                return ops.apply(CATALOGUE[name], args, kwargs, self._model.device, self._generator)
            case CallModule():
                args, kwargs = shapes.arguments(node, self._values.__getitem__)
                with self.pause_hooks():
                    return self._model.call(node.path, args, kwargs)
            case Parameter(path=path):
                return self._model.parameter(path)
            case Constant(tensor=spec):
                array = import_array(spec, check_buffer(spec, self._buffers), "torch")
                return array.to(self._model.device)
            case Held(name=name, otherwise=otherwise):
                begin = None if otherwise is None else self._values[otherwise.node]
                return self.holdings.get(name, begin)
            case Keep(value=Ref(node=kept), name=name):
                self.holdings.keep(name, self._values[kept])
                return None
            case Save(value=Ref(node=saved)):
                self._save(node, number, _detached(self._values[saved]))
                return None
            case EndGeneration(condition=condition):
                self.has_ended |= self._decisions[condition.node]
                return None
            case Log(items=items):
                self._write_line(number, items)
                return None

    def _write_line(self, number: int, items: Sequence[Ref | str]) -> None:
        self._lines += 1
        if self._lines > MAX_LINES:
            return
        shown = [
            item if isinstance(item, str) else _shown(self._values[item.node]) for item in items
        ]
        line = " ".join(shown)[:_MAX_LINE]
        if self._lines == MAX_LINES:
            line += f" (a request logs at most {MAX_LINES} lines: this was the last)"
        self._log(number, line)

    def _own(self, made: list[int]) -> None:
        """Copy what outlives this moment: it may be a view of the batch the model goes on with."""
        if self.fault is not None:
            return  # its values are gone already
        for number in made:
            node = self.program.graph.nodes[number]
            # Parameters and held values stay as they are; a constant lies in memory that this pass
            # will give back.
            lasts = isinstance(node, Parameter | Held)
            lasts |= isinstance(node, Constant) and number not in self.program.kept
            lasts |= number in self.plan.watched
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

    def _flow(self, node: ReadHook, moment: LiveMoment | None) -> Flow | None:
        """Return the tensor that a value enters a module in, if others may use it as well."""
        assert moment is not None
        if node.hook.port != "input" or not self._model.flows(node.hook):
            return None
        tensor = moment.flowing(node.hook.leaf, (id(self), node.invoke))
        if not isinstance(tensor, torch.Tensor) or not tensor.requires_grad:
            return None
        rows = self._rows[node.invoke].now()
        return Flow(tensor, rows, self.program.sites[node.hook], self._model)

    def watched_inputs(self) -> list[int]:
        """Return the orders of the moments at which it watches what enters a module."""
        graph, sites = self.program.graph, self.program.sites
        reads = (graph.nodes[number] for number in self.plan.watched)
        return [
            sites[node.hook].order
            for node in reads
            if isinstance(node, ReadHook) and node.hook.port == "input"
        ]

    def _put(
        self, node: ReadHook | WriteHook, moment: LiveMoment | None, value: torch.Tensor
    ) -> None:
        """Let the model go on with a value in the rows of a hook point."""
        assert moment is not None
        site = self.program.sites[node.hook]
        rows = self._rows[node.invoke]
        whole = value.expand(rows.shape(site))
        target = moment.writable(node.hook.leaf, (id(self), node.invoke))
        rows.write(target, site, self._model.slice(node.hook, whole))

    def squares_at(self, path: str) -> set[tuple[int, int]]:
        """Return the blocks of the packed row whose scores or patterns it touches in a module."""
        return {
            block
            for touched, invoke in self.plan.squares
            if touched == path
            for block in self._rows[invoke].blocks()
        }

    # ------------------------------------------------------------ backward

    def begin_backward(self, backward: BackwardPlan) -> Differentiated:
        """Run the nodes up to a backward, and return what it is about.

        Raises:
            KeyError: the program has failed.
        """
        self.run(backward.order, None)
        watched = [self._flows.get(n, self._values[n]) for n, _ in backward.moments]
        loss, gradient = self._differentiated
        return Differentiated(loss, gradient, watched)

    def take_gradient(
        self, backward: int, of: int, order: int, gradient: torch.Tensor, *, early: bool = False
    ) -> torch.Tensor:
        """Run the nodes that wait for the gradient of a value.

        Args:
            backward, of, order: which one it is, and when it was to be known.
            gradient: itself.
            early: whether others were to be known before; what needs those as well has to wait.

        Returns:
            what it is after them: `gradient` itself, if none has written it.
        """
        key = backward, of
        known = self._gradients[key] = gradient.detach()
        # A later backward may be of something that is made of this gradient, as of a constant.
        with torch.set_grad_enabled(len(self.plan.backwards) > 1):
            self._hoards |= early
            waiting, self._waiting = self._waiting, []
            own = self.plan.nodes.get(order, ())
            for number in sorted([*waiting, *own]):
                if (early or number in waiting) and not self._has_all_for(number):
                    self._waiting.append(number)
                else:
                    deque(self._course([number], None), maxlen=0)
        found = self._gradients.pop(key, known)
        return gradient if found is known else found

    def finish_gradients(self) -> None:
        """Run what still waits, after a backward in which all gradients have come."""
        waiting, self._waiting = self._waiting, []
        deque(self._course(waiting, None), maxlen=0)

    def _has_all_for(self, number: int) -> bool:
        """Whether what a node uses is there, if the node is to run at all."""
        if self.fault is not None or not self._holds(number):
            return True
        node = self.program.graph.nodes[number]
        uses: Iterable[int] = references(node)
        if isinstance(node, Choose):
            if node.condition.node not in self._decisions:
                return False
            chosen = self._decisions[node.condition.node]
            uses = [(node.then if chosen else node.otherwise).node]
        return all(used in self._values for used in uses)

    def fail(self, number: int, message: str, other: int | None = None) -> None:
        """Fail for a reason found at a node; `other` is a second node that has to do with it."""
        graph = self.program.graph
        self.fault = Fault(
            kind="execution",
            message=message,
            node=number,
            source=graph.source_of(number),
            other_source=None if other is None else graph.source_of(other),
        )
        self._values.clear()
        self._flows.clear()
        self._gradients.clear()

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
        if number in self.program.conditions.deciding:
            self._model.agreed(torch.zeros((), dtype=torch.bool, device=self._model.device))
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


def _is_low_rank(node: Node) -> TypeGuard[Apply]:
    return isinstance(node, Apply) and node.op == "low_rank"


def _watched(value: torch.Tensor) -> torch.Tensor:
    """Return a value that autograd knows, with an operation of its own behind it.

    Backward passes through operations in the reverse of the order they were made in; a leaf would
    get its gradient out of turn.
    """
    if not value.requires_grad:
        value = value.detach().requires_grad_()
    return value.clone()


def _detached(value: Any) -> Any:
    return tuple(map(_detached, value)) if isinstance(value, tuple) else value.detach()


def _copied(value: Any) -> Any:
    return tuple(map(_copied, value)) if isinstance(value, tuple) else value.clone()


def _zeros(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_zeros(item, device) for item in value)
    return torch.zeros(value.shape, dtype=value.dtype, device=device)


def _shown(value: ops.Value) -> str:
    """Return a value as a line shows it: a number, or what torch prints."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    if value.dim() == 0:
        return f"{value.item():.6g}" if value.is_floating_point() else str(value.item())
    return str(value.detach().cpu())
