"""A program: a graph put in the order the forward will run it, or refused.

Each node runs at the latest hook point it depends on, in program order there; nodes that depend
on none run where they are first needed. A value is freed after its last use. Values of an earlier
step of a generation are there from the beginning of a step. Pure: no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from ndif_actor.engine.backward import (
    AFTER_FORWARD,
    BackwardPlan,
    plan_backwards,
    watched_values,
)
from ndif_actor.engine.checks import check_references, check_steps, find_sites, graph_fault
from ndif_actor.engine.conditions import Conditions
from ndif_actor.engine.depth import NEVER
from ndif_actor.engine.hookpoints import HookTable, Site
from ndif_actor.engine.moments import Moment
from ndif_actor.errors import RequestError
from ndif_client.wire.graph import (
    MAX_NODES,
    PREFILL,
    Apply,
    Argument,
    Backward,
    Dots,
    Graph,
    HookPoint,
    Items,
    Keep,
    Log,
    ReadGradient,
    ReadHook,
    Ref,
    Save,
    Slice,
    Steps,
    WriteGradient,
    WriteHook,
    references,
)
from ndif_client.wire.messages import Fault

#: Order of nodes that need nothing from the forward.
BEFORE_FORWARD = -1

#: Plans of a program that are kept; most have one or two.
_PLANS = 64

#: Nodes that may be planned in all, at each step where a block begins.
_MOST_WORK = 5 * MAX_NODES


class Reach(msgspec.Struct, frozen=True):
    """What a step needs of the rows of one invoke.

    Attributes:
        last: the last region in which they are read or written; -1 at least.
        first_write: the region from which on they are no longer those of an equal prompt: of the
            first write, or the first read whose gradient is asked for; NEVER if there is none.
        tail: indices into the token axis that are needed in the tail; None for all of it.
    """

    last: int
    first_write: int
    tail: tuple[int | Slice, ...] | None


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to run in one forward.

    Attributes:
        nodes: node numbers by the order of their moment, each list in program order.
        dies: for each node, the values of this step that it uses last.
        last: order of the last moment of the forward it needs; BEFORE_FORWARD if it needs none.
        outlives: nodes whose value is used after the moment that makes it.
        reach: for each invoke.
        touched: the hook points it reads and writes.
        watched: the values whose gradients are asked for.
        backwards: what is differentiated after the forward, in that order.
        squares: attention modules and invokes whose scores or patterns it touches.
    """

    nodes: dict[int, list[int]]
    dies: dict[int, list[int]]
    last: int
    outlives: frozenset[int]
    reach: list[Reach]
    touched: frozenset[HookPoint]
    watched: frozenset[int] = frozenset()
    backwards: tuple[BackwardPlan, ...] = ()
    squares: frozenset[tuple[str, int]] = frozenset()

    def moments(self) -> set[Moment]:
        """The moments at which this program must be woken."""
        return {Moment.of(point) for point in self.touched}


class Program:
    """A checked graph.

    Attributes:
        graph: as it came, but for the seed.
        sites: the site of each hook point it touches.
        conditions: what must hold for its nodes to run.
        kept: for each value that later steps use, the last of these; None for no end.
    """

    def __init__(self, graph: Graph, table: HookTable, num_invokes: int) -> None:
        self.graph = graph
        self.num_invokes = num_invokes
        self.conditions = Conditions(graph)
        self._uses = [references(node) for node in graph.nodes]
        for number, decision in self.conditions.innermost.items():
            self._uses[number].append(decision.node)
        check_references(graph, self._uses, num_invokes)
        self.conditions.check(self._uses)
        self.sites = find_sites(graph, table)
        self._watched = watched_values(graph)
        self.kept = check_steps(graph, self._uses)
        self._stays = {*self.kept, *(v for values in self._watched.values() for v in values)}
        self._layers = table.layers
        self._in_block: dict[int, list[int]] = {}
        for number in range(len(graph.nodes)):
            self._in_block.setdefault(self._block(number), []).append(number)
        self._plans: dict[tuple[int, ...], StepPlan] = {}
        self._check_work()
        for step in self.first_steps():
            self.at(step)

    def _check_work(self) -> None:
        """Refuse a graph whose overlapping blocks would take seconds to plan."""
        sizes = [(self._steps(block), len(nodes)) for block, nodes in self._in_block.items()]
        work = sum(size for step in self.first_steps() for steps, size in sizes if step in steps)
        if work > _MOST_WORK:
            message = (
                f"{len(sizes)} overlapping blocks of steps make {work} operations where a block "
                f"begins, at most {_MOST_WORK} are allowed; use fewer blocks"
            )
            raise RequestError(Fault(kind="limit", message=message))

    def writes_gradient(self, backward: int, value: int) -> bool:
        """Whether the gradient of a value is replaced in a backward."""
        return any(
            isinstance(node, WriteGradient) and (node.backward, node.of.node) == (backward, value)
            for node in self.graph.nodes
        )

    def first_steps(self) -> list[int]:
        """Return the steps at which something runs for the first time, the prefill always."""
        return sorted({0, *(steps.start for steps in self.blocks())})

    def blocks(self) -> list[Steps]:
        """Return the steps of every block that has nodes."""
        return [self._steps(block) for block in self._in_block]

    def at(self, step: int) -> StepPlan:
        """Return what to run at one step.

        Raises:
            RequestError: a write needs a value that does not exist yet.
        """
        active = tuple(block for block in self._in_block if step in self._steps(block))
        plan = self._plans.get(active)
        if plan is None:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plan = self._plans[active] = self._plan(active)
        return plan

    def nodes_at(self, step: int) -> list[int]:
        """Return the nodes that run at a step, in program order."""
        active = (block for block in self._in_block if step in self._steps(block))
        return sorted(number for block in active for number in self._in_block[block])

    # ------------------------------------------------------------ one step

    def _block(self, number: int) -> int:
        return self.graph.during[number] if self.graph.during else 0

    def _steps(self, block: int) -> Steps:
        return self.graph.steps[block] if self.graph.during else PREFILL

    def _plan(self, active: tuple[int, ...]) -> StepPlan:
        numbers = sorted(number for block in active for number in self._in_block[block])
        orders, backwards = self._orders(numbers)
        nodes: dict[int, list[int]] = {}
        for number in numbers:
            nodes.setdefault(orders[number], []).append(number)
        dies, outlives = self._lifetimes(nodes, orders)
        hooked = [n for n in numbers if isinstance(self.graph.nodes[n], ReadHook | WriteHook)]
        watched = frozenset(value for plan in backwards for value, _ in plan.moments)
        return StepPlan(
            nodes=nodes,
            dies=dies,
            last=max((order for order in nodes if order < AFTER_FORWARD), default=BEFORE_FORWARD),
            outlives=outlives,
            reach=self._reach(hooked, numbers, watched),
            touched=frozenset(self.graph.nodes[n].hook for n in hooked),  # type: ignore[union-attr]
            watched=watched,
            backwards=backwards,
            squares=frozenset(
                (node.hook.path, node.invoke)
                for node in (self.graph.nodes[number] for number in hooked)
                if isinstance(node, ReadHook | WriteHook) and self.sites[node.hook].square
            ),
        )

    def _orders(self, numbers: Sequence[int]) -> tuple[dict[int, int], tuple[BackwardPlan, ...]]:
        """Return for each node the order of the moment it runs at, and the backwards."""
        orders = self._order(numbers, {})
        own = set(numbers)
        watched = {node: values for node, values in self._watched.items() if node in own}
        if not watched:
            return orders, ()
        # When gradients become known follows from when the values are: only now can the nodes
        # that use them be put in order.
        backwards = plan_backwards(self.graph, self._uses, orders, watched, self.sites)
        begins = {plan.node: plan.order for plan in backwards}
        gradients = {(p.node, value): order for p in backwards for value, order in p.moments}
        return self._order(numbers, gradients, begins), backwards

    def _order(
        self,
        numbers: Sequence[int],
        gradients: Mapping[tuple[int, int], int],
        begins: Mapping[int, int] | None = None,
    ) -> dict[int, int]:
        nodes = self.graph.nodes
        orders: dict[int, int] = {}
        latest: dict[int, int | None] = {}
        for number in numbers:
            node = nodes[number]
            used = [n for n in self._uses[number] if n in orders]
            # The read that makes a value late is remembered, to be named when it is too late.
            late = max(used, key=orders.__getitem__, default=None)
            order = orders[late] if late is not None else BEFORE_FORWARD
            culprit = latest[late] if late is not None else None
            target: int | None = None
            if isinstance(node, ReadHook):
                order, culprit = self.sites[node.hook].order, number
            elif isinstance(node, WriteHook):
                target = self.sites[node.hook].order
            elif isinstance(node, Backward):
                target = None if begins is None else begins[number]
                order, culprit = AFTER_FORWARD, number
            elif isinstance(node, ReadGradient):
                order = gradients.get((node.backward, node.of.node), AFTER_FORWARD)
                culprit = number
            elif isinstance(node, WriteGradient):
                target = gradients.get((node.backward, node.of.node), max(order, AFTER_FORWARD))
            if target is not None:
                if order > target:
                    raise _too_late(self.graph, number, culprit)
                order = target
            orders[number] = order
            latest[number] = culprit
        self._postpone(numbers, orders)
        return orders

    def _postpone(self, numbers: Sequence[int], orders: dict[int, int]) -> None:
        """Move nodes that need nothing from the forward to where they are first used."""
        first_use: dict[int, int] = {}
        for number in reversed(numbers):
            node = self.graph.nodes[number]
            movable = not isinstance(node, Keep | Log | Save) and number not in self._stays
            if orders[number] == BEFORE_FORWARD and movable:
                orders[number] = first_use.get(number, BEFORE_FORWARD)
            for used in self._uses[number]:
                first_use[used] = min(first_use.get(used, orders[number]), orders[number])

    def _lifetimes(
        self, nodes: dict[int, list[int]], orders: dict[int, int]
    ) -> tuple[dict[int, list[int]], frozenset[int]]:
        """Return what dies at each node, and which values outlive the moment that makes them."""
        last_use: dict[int, int] = {}
        outlives = {number for number in orders if number in self.kept}
        for order in sorted(nodes):
            for number in nodes[order]:
                for used in self._uses[number]:
                    if used not in orders or used in self.kept:
                        continue
                    last_use[used] = number
                    if orders[used] != order:
                        outlives.add(used)
        dies: dict[int, list[int]] = {}
        for used, number in last_use.items():
            dies.setdefault(number, []).append(used)
        return dies, frozenset(outlives)

    # ------------------------------------------------------------ depth

    def _reach(
        self, hooked: Sequence[int], numbers: Sequence[int], watched: frozenset[int]
    ) -> list[Reach]:
        last = [-1] * self.num_invokes
        first_write = [NEVER] * self.num_invokes
        tail: list[set[int | Slice] | None] = [set() for _ in range(self.num_invokes)]
        if self._layers is None:
            return [Reach(0, -1, None)] * self.num_invokes
        users = self._users(numbers)
        for number in hooked:
            node = self.graph.nodes[number]
            assert isinstance(node, ReadHook | WriteHook)
            site, invoke = self.sites[node.hook], node.invoke
            region = self._layers.region(site.order)
            last[invoke] = max(last[invoke], region)
            if isinstance(node, WriteHook) or number in watched:
                first_write[invoke] = min(first_write[invoke], region)
            if region == self._layers.tail:
                needed = self._needed(number, site, users.get(number, []))
                found = tail[invoke]
                tail[invoke] = None if found is None or needed is None else found | needed
        return [
            Reach(region, write, None if need is None else tuple(need))
            for region, write, need in zip(last, first_write, tail, strict=True)
        ]

    def _users(self, numbers: Sequence[int]) -> dict[int, list[int]]:
        users: dict[int, list[int]] = {}
        for number in numbers:
            for used in self._uses[number]:
                users.setdefault(used, []).append(number)
        return users

    def _needed(
        self, number: int, site: Site, users: Sequence[int]
    ) -> frozenset[int | Slice] | None:
        """Return the indices into the token axis that all users of a read look at; None for all."""
        if isinstance(self.graph.nodes[number], WriteHook) or number in self.kept:
            return None
        needed: set[int | Slice] = set()
        for user in users:
            node = self.graph.nodes[user]
            if not isinstance(node, Apply) or node.op != "getitem" or len(node.args) != 2:
                return None
            if not isinstance(node.args[0], Ref) or node.args[0].node != number:
                return None
            index = _token_index(node.args[1], site)
            if index is None:
                return None
            needed.add(index)
        return frozenset(needed)


def compile_graph(graph: Graph, table: HookTable, num_invokes: int, num_steps: int = 1) -> Program:
    """Check a graph and order its nodes along the forward.

    Args:
        graph: as it came.
        table: the model's hook points.
        num_invokes: how many invokes the request has.
        num_steps: how many steps it may take; 1 for a trace.

    Raises:
        RequestError: the graph can never run: a reference to a later node, an unknown hook point,
            a module that can't be called, a write of a value that does not exist yet, or a step
            that is never made.
    """
    program = Program(graph, table, num_invokes)
    for number in range(len(graph.nodes)):
        steps = graph.steps_of(number)
        if steps.start >= num_steps:
            made = f"steps 0 to {num_steps - 1} are" if num_steps > 1 else "only step 0 is"
            raise graph_fault(graph, number, f"{steps} will never be made, {made}")
    return program


def _too_late(graph: Graph, number: int, culprit: int | None) -> RequestError:
    """Return the refusal of a write whose value is made after the moment it is for."""
    node = graph.nodes[number]
    made = graph.nodes[culprit] if culprit is not None else None
    if isinstance(node, WriteGradient):
        what = "a gradient is written with a value that needs"
        when = "is known only afterwards: gradients come in the reverse order of the forward"
    else:
        assert isinstance(node, WriteHook)
        what = f"{node.hook} is written with a value that needs"
        when = "the model reaches only afterwards"
    match made:
        case ReadHook(hook=hook):
            why = f"{hook}, which {when}"
        case ReadGradient() | Backward():
            why = "a gradient, which is known only after the forward"
            if isinstance(node, WriteGradient):
                why = f"the gradient of another value, which {when}"
        case _:
            why = f"a later hook point, which {when}"
    return graph_fault(graph, number, f"{what} {why}", culprit)


def _token_index(index: Argument, site: Site) -> int | Slice | None:
    """Return what an index takes of the token axis; None if that can't be told, or is all."""
    if site.batch_axis is None:
        return None
    items: Iterable[Argument] = index.values if isinstance(index, Items) else [index]
    expanded: list[Argument] = []
    rest = len(site.shape) - sum(not isinstance(item, Dots) for item in items)
    for item in items:
        expanded += [Slice()] * rest if isinstance(item, Dots) else [item]
    if not all(isinstance(i, Slice) or type(i) is int for i in expanded):
        return None
    if len(expanded) <= site.token_axis:
        return None
    found = expanded[site.token_axis]
    return None if found == Slice() else found  # type: ignore[return-value]
