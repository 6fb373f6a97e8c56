"""The graph of one trace while it is being written: nodes, constants, the user's lines, saves.

The recorder knows nodes and their order in the forward; it knows nothing of Python operators
(`proxy`), of modules (`envoy`) or of the server (`transport`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from ndif_client.brought import Brought
from ndif_client.carrying import check_carried, variables
from ndif_client.differentiated import Differentiated
from ndif_client.errors import ClosedTraceError, LimitError, OrderError, graph_error
from ndif_client.guards import Guards
from ndif_client.results import RESERVED_NAMES, Layout, Result, leaves, paths
from ndif_client.skips import Skips, is_lost
from ndif_client.sources import Lines, capture
from ndif_client.steps import (
    BEFORE_FORWARD,
    PREFILL_BLOCK,
    Block,
    Moment,
    Moments,
    overlap,
)
from ndif_client.wire.graph import (
    MAX_NODES,
    MAX_STEP_BLOCKS,
    PREFILL,
    Apply,
    Argument,
    Choose,
    Constant,
    EndGeneration,
    Graph,
    Held,
    HookPoint,
    Invoke,
    Log,
    Node,
    Parameter,
    ReadHook,
    Ref,
    Save,
    Source,
    Steps,
    WriteHook,
    references,
)
from ndif_client.wire.messages import HookInfo

if TYPE_CHECKING:
    from ndif_client.facts import Facts
    from ndif_client.held import Holder

#: Characters of a saved value's name.
_MAX_NAME = 256

_current: ContextVar[Recorder | None] = ContextVar("ndif_recorder", default=None)


@dataclass(slots=True)
class Origin:
    """How far the trace is that is recorded, for those who wait for what it keeps.

    Attributes:
        request: its id.
        failure: why nothing will come of it.
    """

    request: str
    was_submitted: bool = False
    has_ended: bool = False
    failure: BaseException | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.has_ended or self.failure is not None


class Recorder(Brought, Differentiated):
    """Collects the nodes of one trace in the order the user writes them.

    Attributes:
        invokes: the prompts, one entry an invoke.
        invoke: which of them reads and writes belong to now; None outside of all.
        block: the generation steps that nodes are recorded for now.
        names: what the saved values are called; a name may stand for a list or dict of them.
        result: what came back, once it has.
        holder: what its session holds on the server.
        origin: how far it is.
        seed: of the random operations.
        generates: whether it is about a generation.
        lines: of the user's program, that its nodes come from.

    Args:
        request: its id.
        holder, seed, generates: as above.
        edits: whether it is about an edit, which nothing comes back from.
    """

    def __init__(
        self,
        request: str = "",
        holder: Holder | None = None,
        *,
        seed: int = 0,
        generates: bool = False,
        edits: bool = False,
    ) -> None:
        super().__init__()
        self.holder = holder
        self.origin = Origin(request)
        self.seed = seed
        self.edits = edits
        self.invokes: list[Invoke] = []
        self.invoke: int | None = None
        self.block = PREFILL_BLOCK
        self.names: dict[str, Layout] = {}
        #: who is told of the lines that a node writes
        self.logs: dict[int, Callable[[str], object]] = {}
        self.result: Result | None = None
        #: what was read at a hook point, by invoke and steps
        self.seen: dict[tuple[HookPoint, int, Steps], Any] = {}
        #: what is known about its values, where the server can be asked
        self.facts: Facts | None = None
        self._failure: BaseException | None = None
        self.closed_at: Source | None = None
        self.generates = generates
        self._opened_block: Source | None = None
        self.lines = Lines()
        self.guards = Guards()
        self._skips = Skips()
        self._opened_with_gradients = False
        self._detached: dict[tuple[int, int, Block], int] = {}
        self._steps_used: set[Steps] = {PREFILL}
        self._moments = Moments()
        self._ends = False
        self._saves: dict[int, int] = {}
        self._write_orders: dict[int, int] = {}
        self._last_writes: dict[tuple[HookPoint, int], dict[Steps, int]] = {}
        self._reads: dict[tuple[HookPoint, int, int | None], int] = {}
        self._first_reads: dict[int, int] = {}

    @property
    def failure(self) -> BaseException | None:
        """Why nothing will come back."""
        return self._failure

    @failure.setter
    def failure(self, failure: BaseException | None) -> None:
        self._failure = self.origin.failure = failure

    # ------------------------------------------------------------ life

    def open(self) -> None:
        """Note how it begins."""
        self._opened_with_gradients = _gradients_are_on()

    def is_without_gradients(self) -> bool:
        """Whether a `torch.no_grad()` block was entered since it began."""
        return self._opened_with_gradients and not _gradients_are_on()

    def detached(self, node: int) -> int:
        """Return a node's value without its gradient history, recorded here once."""
        place = node, self.guards.now, self.block
        if place not in self._detached:
            self._detached[place] = self.add(Apply("detach", [Ref(node)]))
        return self._detached[place]

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

    @contextmanager
    def during(self, block: Block) -> Iterator[None]:
        """Within the block, nodes are recorded for those steps.

        Raises:
            ClosedTraceError: nothing is recorded here, or the generation has ended.
            GraphError: it stands inside of another one.
            LimitError: there are too many of them.
        """
        self.check_open()
        if _current.get() is not self:
            raise graph_error(
                f"a block of {block.steps} belongs inside of the generation's own `with` block",
                ClosedTraceError,
            )
        if self._opened_block is not None:
            raise graph_error(
                f"a block of {block.steps} inside of one of {self.block.steps}: steps blocks can't "
                "be nested; end that one first",
                other=self._opened_block,
            )
        before = {} if block.steps.single else variables(self)
        self._steps_used.add(block.steps)
        if len(self._steps_used) > MAX_STEP_BLOCKS:
            raise LimitError(
                f"a generation has at most {MAX_STEP_BLOCKS} different blocks of steps; use "
                "gen.all() or a slice, which save one value for each step"
            )
        self.block, self._opened_block = block, capture()
        first = len(self._nodes)
        try:
            yield
            check_carried(self, before, first)
        finally:
            self.block, self._opened_block = PREFILL_BLOCK, None

    @contextmanager
    def under(self, condition: int, *, negated: bool = False) -> Iterator[None]:
        """Within the block, nodes are recorded to run only if a node's value is (not) 0.

        Raises:
            ClosedTraceError: nothing is recorded here.
            LimitError: there are too many conditions.
        """
        self.check_open()
        if _current.get() is not self:
            raise graph_error(
                "a condition belongs inside of the `with` block of its own trace", ClosedTraceError
            )
        number = self.guards.add(condition, negated, self.guards.now)
        with self.guards.under(number):
            yield

    @contextmanager
    def again(self, block: Block) -> Iterator[None]:
        """Within the block, nodes are recorded for steps that have been opened before."""
        previous, self.block = self.block, block
        try:
            yield
        finally:
            self.block = previous

    def close(self, at: Source) -> None:
        """Take no more nodes; `at` is the line that ended the trace."""
        self.closed_at = at
        # These refer to it in turn, and it holds large results.
        self.seen.clear()
        self.facts = None

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

    def add(self, node: Node, order: int | None = None, *, block: Block | None = None) -> int:
        """Append a node and return its number.

        Args:
            node: what to append.
            order: of a read, when its hook point fires.
            block: the steps it runs at, if not those that are recorded now.

        Raises:
            ClosedTraceError: the trace has ended.
            LimitError: the graph is full.
            OrderError: it uses a value that does not exist at its steps.
        """
        self.check_open()
        number = len(self._nodes)
        under = self.guards.now
        if isinstance(node, Constant | Parameter | Held):
            under = 0
        elif isinstance(node, Save):
            under = self.guards.of[node.value.node]
        if number >= MAX_NODES:
            raise LimitError(
                f"a trace has at most {MAX_NODES} operations; split it into several traces"
            )
        if isinstance(node, Constant | Parameter | Held):
            block = PREFILL_BLOCK
        block = block or self.block
        uses = references(node)
        for used in uses:
            self._check_made(used, node, under)
            if self._opened_block is None and not isinstance(node, Save):
                self._check_one_step(used)
            if not self._moments.exists(used, block.steps):
                self._refuse_absent(used, block.steps)
        own: Moment = BEFORE_FORWARD if order is None else (order, number)
        self._moments.add(block.steps, uses, own)
        self._nodes.append(node)
        self._blocks.append(block)
        self.lines.note()
        self.guards.of.append(under)
        return number

    def is_made(self, node: int) -> bool:
        """Whether a node's value exists wherever nodes are recorded for now."""
        return self.guards.is_made(node, self.guards.now)

    def check_read(self, hook: HookPoint) -> None:
        """Refuse a read for the current invoke where it can't be; raises GraphError."""
        self._skips.check(hook, self.here(str(hook)), self.block.steps)

    def read(self, hook: HookPoint, info: HookInfo) -> int:
        """Record a read for the current invoke and return the node's number."""
        invoke = self.here(str(hook))
        self.check_read(hook)
        number = self.add(ReadHook(hook, invoke), info.order)
        seen = (hook, invoke, self.last_write(hook, invoke))
        if not self.guards.now:
            self._first_reads[number] = self._reads.setdefault(seen, number)
        return number

    def write(self, hook: HookPoint, info: HookInfo, value: Argument, invoke: int) -> int:
        """Record a write of an encoded value and return the node's number.

        Raises:
            OrderError: the value is made later in the forward than the hook point fires.
            GraphError: the hook point is read-only.
        """
        self.check_open()
        self._skips.check(hook, invoke, self.block.steps)
        if not info.dtype.startswith(("float", "bfloat", "complex")):
            raise graph_error(
                f"{hook} holds {info.dtype} and is read-only; to change what the model sees, "
                "write the output of its embedding",
                hook=str(hook),
            )
        steps = self.block.steps
        if isinstance(value, Ref) and self._moments.exists(value.node, steps):
            order, read = self._moments.latest(value.node, steps)
            if order > info.order:
                self._refuse_late(hook, read)
        number = self.add(WriteHook(hook, value, invoke))
        self._write_orders[number] = info.order
        self._last_writes.setdefault((hook, invoke), {})[steps] = number
        return number

    def last_write(self, hook: HookPoint, invoke: int) -> int | None:
        """Return the number of the last write at a hook point, at any step recorded now."""
        writes = self._last_writes.get((hook, invoke), {})
        now = self.block.steps
        return max((number for at, number in writes.items() if overlap(at, now)), default=None)

    def was_just_written(self, hook: HookPoint, invoke: int, node: int) -> bool:
        """Whether `node` is the value that was written last at this hook point and its steps."""
        number = self.last_write(hook, invoke)
        if number is None or self._blocks[number].steps != self.block.steps:
            return False
        write = self._nodes[number]
        return isinstance(write, WriteHook) and write.value == Ref(node)

    def skip(self, path: str) -> None:
        """Refuse from now on what lies inside of a module, in this invoke and at these steps.

        Raises:
            GraphError: it is used already.
        """
        invoke, steps = self.here(path), self.block.steps
        for number, node in enumerate(self._nodes):
            if is_lost(node, path, invoke) and overlap(self._blocks[number].steps, steps):
                assert isinstance(node, ReadHook | WriteHook)
                raise graph_error(
                    f"{path} is skipped, so what is done to {node.hook} before would never be "
                    "reached",
                    hook=str(node.hook),
                    other=self.source_of(number),
                )
        self._skips.add(path, invoke, steps)

    def attends_at(self, steps: Steps) -> bool:
        """Whether something is read at these steps that grows with every one of them."""
        reads = [
            node
            for node, block in zip(self._nodes, self._blocks, strict=True)
            if isinstance(node, ReadHook) and overlap(block.steps, steps)
        ]
        return any(node.hook.port not in ("input", "output", "query", "result") for node in reads)

    def is_used(self, node: int) -> bool:
        """Whether anything was computed with a node's value."""
        return any(
            node in references(other) for other in self._nodes if not isinstance(other, Save | Log)
        )

    def first_read(self, node: int) -> int:
        """Return the first read of what a read has seen: its gradient is the hook point's own."""
        return self._first_reads.get(node, node)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been recorded."""
        return not self._nodes

    @property
    def has_effects(self) -> bool:
        """Whether a hook point is written, a value kept, a line logged, or the generation ended."""
        return bool(self._last_writes or self._keeps or self.logs or self._ends)

    def save(self, node: int) -> int:
        """Record that a value is to be sent back, once; return the number of the save.

        A save runs at the steps of its value, wherever it is written.
        """
        if self.edits:
            raise graph_error("nothing comes back from an edit, so nothing can be saved in it")
        if node not in self._saves:
            self._saves[node] = self.add(Save(Ref(node)), block=self._blocks[node])
        return self._saves[node]

    def end_when(self, condition: int) -> None:
        """Record that the generation ends with a step where a value is not 0."""
        self.add(EndGeneration(Ref(condition)))
        self._ends = True

    def log(self, items: list[Ref | str], to: Callable[[str], object]) -> None:
        """Record that a line is to be told when it is reached."""
        self.logs[self.add(Log(items))] = to

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
                other=self.source_of(first),
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
                "give the prompt to session.trace(...) or session.generate(...)",
                ClosedTraceError,
            )
        return self.invoke

    def source_of(self, node: int) -> Source:
        """Return the user's line that made a node."""
        return self.lines[node]

    def block_of(self, node: int) -> Block:
        """Return the steps block that a node was recorded in."""
        return self._blocks[node]

    def nodes_in_order(self) -> list[tuple[int, Node]]:
        """Return the nodes of the prefill with their numbers, in the order of the forward."""
        orders = [self._moments.latest(number, PREFILL)[0] for number in range(len(self._nodes))]
        for number, order in self._write_orders.items():
            orders[number] = order
        return sorted(enumerate(self._nodes), key=lambda pair: (orders[pair[0]], pair[0]))

    def saved_by(self, save: int) -> int:
        """Return the number of the node that a save sends back."""
        node = self._nodes[save]
        assert isinstance(node, Save)
        return node.value.node

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
        graph = Graph(nodes, list(self.lines.sources), list(self.lines.at), seed=self.seed)
        if self.guards.conditions:
            conditions, under = list(self.guards.conditions), list(self.guards.of)
            graph = replace(graph, conditions=conditions, under=under)
        blocks = [block.steps for block in self._blocks]
        if all(steps == PREFILL for steps in blocks):
            return graph
        numbers = {steps: number for number, steps in enumerate(dict.fromkeys(blocks))}
        during = [numbers[steps] for steps in blocks]
        return replace(graph, steps=list(numbers), during=during)

    def conditional_saves(self) -> frozenset[int]:
        """Return the numbers of the saves that need not be reached."""
        return frozenset(number for number in self._saves.values() if self.guards.of[number])

    def _check_made(self, used: int, node: Node, under: int) -> None:
        """Refuse a value that was made under a condition which need not hold here."""
        if isinstance(node, Choose) or self.guards.is_made(used, under):
            return
        raise graph_error(
            "a value made in a `when` block is used outside of it, where it need not exist; use "
            "trace.choose(condition, a, b), or change a value that was there before",
            OrderError,
            other=self.source_of(used),
        )

    def _check_one_step(self, used: int) -> None:
        """Refuse a value of many steps outside of all blocks, where only the prefill is meant."""
        own = self._blocks[used].steps
        if not own.single and self.block == PREFILL_BLOCK:
            raise graph_error(
                f"a value of {own} is used outside of their block, at the prefill alone: compute "
                "with it in the block, or save it and go on with the list of its values",
                OrderError,
                other=self.source_of(used),
            )

    def _refuse_absent(self, node: int, steps: Steps) -> None:
        own = self._blocks[node].steps
        if own.single:
            hint = f"it is there from {own} on"
        else:
            hint = "a value can be used in its own step, and one of a single step also later"
        raise graph_error(
            f"a value of {own} is used at {steps}, where it has no one value: {hint}",
            OrderError,
            other=self.source_of(node),
        )

    def _refuse_late(self, hook: HookPoint, read: int) -> None:
        culprit = self._nodes[read]
        needed = "a gradient, which is known only after the forward"
        if isinstance(culprit, ReadHook):
            needed = f"{culprit.hook}, which the model reaches only afterwards"
        raise graph_error(
            f"{hook} is written with a value that needs {needed}",
            OrderError,
            other=self.source_of(read),
            hook=str(hook),
        )


def _gradients_are_on() -> bool:
    torch = sys.modules.get("torch")
    return torch is None or bool(torch.is_grad_enabled())


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


def recorded_place() -> tuple[Steps, int] | None:
    """Return the generation steps and the condition that nodes are recorded for here now.

    None outside of all traces.
    """
    recorder = _current.get()
    return None if recorder is None else (recorder.block.steps, recorder.guards.now)
