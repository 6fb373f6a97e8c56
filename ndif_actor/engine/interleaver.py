"""Where a hook point is executed: the programs of all groups, woken inside one forward.

Each moment that any program needs is hooked; where one lies inside of a module's forward, that
module's operations are watched, for this pass. When it comes, the groups that wait for it run their
nodes, in the order the groups joined, each on a view of its own rows. A group whose node fails is
marked failed and stays silent; the forward and its neighbours go on. Which collectives run, and
in which order, follows from the programs alone, so all shards stay in step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from ndif_actor.engine import leaves
from ndif_actor.engine.execution import Execution
from ndif_actor.engine.hookpoints import HookTable
from ndif_actor.engine.internals import PORTS, Squares, listening
from ndif_actor.engine.layers import Boundary
from ndif_actor.engine.low_rank import LowRank, compute_together
from ndif_actor.engine.moments import Moment
from ndif_actor.engine.operations import Unoffered, watching
from ndif_actor.engine.program import BEFORE_FORWARD
from ndif_client.wire.graph import AttentionPort, Port

#: After every moment, so that a forward which must reach it returns what it computes.
END_OF_FORWARD = 1 << 30


#: What the course of a group ends with.
_ENDED = object()


class ForwardComplete(BaseException):
    """Raised inside a forward when no program needs more of it; not an error."""


class Interleaver:
    """Runs the executions of one pass at their moments."""

    def __init__(
        self,
        model: torch.nn.Module,
        table: HookTable,
        groups: list[Execution],
        at_least: int = BEFORE_FORWARD,
    ) -> None:
        """Prepare a pass.

        Args:
            model: the shard.
            table: its hook points.
            groups: in the order they are woken.
            at_least: order of the moment that the forward must reach, whatever the programs need.
        """
        self._model = model
        self._layers = table.layers
        self._groups = groups
        self._orders = {
            moment: table.moments[moment] for group in groups for moment in group.plan.moments()
        }
        self._last = max((group.plan.last for group in groups), default=BEFORE_FORWARD)
        if at_least > self._last:
            self._last = at_least
            self._orders.update((m, at) for m, at in table.moments.items() if at == at_least)
        self._ports = {(m.path, m.port) for m in self._orders if not m.operation}
        self._calls: Counter[tuple[str, Port, str]] = Counter()
        self._missing = {moment for moment in self._orders if moment.operation}
        self._paused = False
        self._copies: dict[int, Copy] = {}
        self._differentiating = False

    @property
    def needs_forward(self) -> bool:
        """Whether anybody waits for something of the forward."""
        return self._last > BEFORE_FORWARD

    def paused(self) -> bool:
        """Whether a program calls a module now."""
        return self._paused

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within the block, forwards of the model wake the programs.

        The block ends early, and quietly, after the last moment that any program needs.
        """
        self._differentiating = torch.is_grad_enabled()
        inside: dict[torch.nn.Module, str] = {}
        with ExitStack() as stack:
            if self._differentiating:
                self._begin_gradients(stack)  # before anybody is woken there
            for path, port in self._ports:
                module = self._model.get_submodule(path)
                if port in PORTS:
                    inside[module] = path
                else:
                    stack.callback(self._hook(module, path, port).remove)
            if inside:
                stack.enter_context(listening(_Ear(self, inside)))
            for path in {moment.path for moment in self._missing}:
                with suppress(Unoffered):  # those that wait for it are refused in the end
                    stack.enter_context(self._watch(path))
            for group in self._groups:
                group.pause_hooks = self._pause
            with suppress(ForwardComplete):
                yield
        if self._missing:
            self._refuse_missing()

    def _begin_gradients(self, stack: ExitStack) -> None:
        """Let autograd follow what flows through the layers from where somebody needs it to.

        What enters a module is used by others, too. Its gradient is that of all of them, if it is
        known to autograd when it enters: from the beginning of its layer on.
        """
        entered = {order for group in self._groups for order in group.watched_inputs()}
        layers = self._layers
        regions = {-1 if layers is None else layers.region(order) for order in entered}
        if -1 in regions:
            embedding = self._model.get_input_embeddings()  # type: ignore[operator]
            stack.callback(
                embedding.register_forward_hook(lambda _, args, output: _followed(output)).remove
            )
        for region in {region - region % 2 for region in regions if region >= 0}:
            assert layers is not None
            stack.callback(self._follow(layers.boundaries[region]).remove)

    def _follow(self, boundary: Boundary) -> RemovableHandle:
        def before(_: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            if self._paused:
                return None
            entered = leaves.inputs(args, kwargs)
            flow = leaves.get(entered, boundary.flow)
            changed = leaves.replace(entered, boundary.flow, _followed(flow))
            return changed["args"], changed["kwargs"]

        module = self._model.get_submodule(boundary.path)
        return module.register_forward_pre_hook(before, with_kwargs=True)

    def _watch(self, path: str) -> AbstractContextManager[None]:
        """Within the block, the operations of one module wake the programs."""
        names = {moment.operation for moment in self._missing if moment.path == path}

        def watch(operation: str, port: Port, structure: Any) -> Any:
            return self.wake(path, port, structure, operation)

        return watching(self._model.get_submodule(path), watch, names)

    def _refuse_missing(self) -> None:
        """Fail the groups that wait for an operation which this forward had no use for."""
        for group in self._groups:
            if missed := self._missing & group.plan.moments():
                group.miss(min(missed, key=self._orders.__getitem__))

    def _hook(self, module: torch.nn.Module, path: str, port: Port) -> Any:
        if port == "input":

            def before(_: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
                changed = self.wake(path, port, leaves.inputs(args, kwargs))
                return None if changed is None else (changed["args"], changed["kwargs"])

            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(lambda _, args, output: self.wake(path, port, output))

    def touches(self, path: str, port: Port) -> bool:
        """Whether any program waits for this hook point."""
        return (path, port) in self._ports

    def explicit(self, path: str) -> list[tuple[int, int]]:
        """Return the blocks of rows whose scores or patterns in an attention are touched."""
        blocks: set[tuple[int, int]] = set()
        for group in self._groups:
            blocks |= group.squares_at(path)
        return sorted(blocks)

    def wake(self, path: str, port: Port, structure: Any, operation: str = "") -> Any:
        """Run what waits for this moment; return the changed structure, or None if unchanged."""
        if self._paused:
            return None
        moment = Moment(path, port, self._calls[path, port, operation], operation)
        self._calls[path, port, operation] += 1
        order = self._orders.get(moment)
        if order is None:
            return None
        self._missing.discard(moment)
        here = LiveMoment(structure, self._copies if self._differentiating else None)
        # The model computes rotary embeddings without gradients; what users compute there has them.
        with torch.set_grad_enabled(True) if self._differentiating else nullcontext():
            _run_together([group.course(order, here) for group in self._groups])
        if order == self._last:
            raise ForwardComplete
        return here.structure if here.changed else None

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Within the block, modules called by a program's own node wake nobody."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False


def _followed(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that autograd knows."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def _run_together(courses: Sequence[Iterator[LowRank | None]]) -> None:
    """Run the nodes of all groups at one moment; what several stop at is computed as one."""
    while courses:
        stops = [(course, next(course, _ENDED)) for course in courses]
        compute_together([stop for _, stop in stops if isinstance(stop, LowRank)])
        courses = [course for course, stop in stops if stop is not _ENDED]


class _Ear:
    """Wakes programs that wait for what passes inside of attentions."""

    def __init__(self, interleaver: Interleaver, paths: dict[torch.nn.Module, str]) -> None:
        self._interleaver = interleaver
        self._paths = paths

    def wants(self, module: torch.nn.Module, port: AttentionPort) -> bool:
        return module in self._paths and self._interleaver.touches(self._paths[module], port)

    def explicit(self, module: torch.nn.Module) -> list[tuple[int, int]]:
        return self._interleaver.explicit(self._paths[module]) if module in self._paths else []

    def fire(self, module: torch.nn.Module, port: AttentionPort, value: Any) -> Any:
        changed = self._interleaver.wake(self._paths[module], port, value)
        return value if changed is None else changed


#: Whose some rows are: an execution, by its `id`, and the number of its invoke.
Owner = tuple[int, int]


class Copy(NamedTuple):
    """What the model goes on with in the place of a tensor, and whose rows differ in it."""

    made: torch.Tensor | Squares
    original: torch.Tensor | Squares
    writers: set[Owner]


class LiveMoment:
    """The tensors at one moment of the running forward.

    The first write to a tensor copies it, so that reads made before, and other holders of the same
    memory in the model (a residual stream, an identity dropout), don't see the write.
    """

    def __init__(self, structure: Any, copies: dict[int, Copy] | None = None) -> None:
        self._copies = {} if copies is None else copies
        self.structure = structure
        self.changed = False
        self._copied: set[str] = set()
        self._entered = structure
        self._writers: dict[str, set[Owner]] = {}

    def tensor(self, leaf: str) -> torch.Tensor | Squares:
        """Return the tensor at `leaf`, to be read."""
        found: torch.Tensor | Squares = leaves.get(self.structure, leaf)
        return found

    def flowing(self, leaf: str, owner: Owner) -> torch.Tensor | Squares | None:
        """Return the tensor that has come to `leaf`, which other modules may use too.

        None if the owner of the rows that are meant has written them here: what the module gets
        is nobody else's then.
        """
        if owner in self._writers.get(leaf, ()):
            return None
        found: torch.Tensor | Squares = leaves.get(self._entered, leaf)
        # Where others have written before, or asked for a gradient, theirs is a copy.
        while (copy := self._copies.get(id(found))) is not None and owner not in copy.writers:
            found = copy.original
        return found

    def writable(self, leaf: str, owner: Owner) -> torch.Tensor | Squares:
        """Return the tensor at `leaf`, in which the owner of some rows is to write these."""
        self._writers.setdefault(leaf, set()).add(owner)
        if leaf not in self._copied:
            original = self.tensor(leaf)
            made = _copy(original)
            self._copies[id(made)] = Copy(made, original, self._writers[leaf])
            self.structure = leaves.replace(self.structure, leaf, made)
            self._copied.add(leaf)
            self.changed = True
        return self.tensor(leaf)

    def is_written(self, leaf: str) -> bool:
        """Whether a later write may change what was read from `leaf` in place."""
        return leaf in self._copied


def _copy(tensor: torch.Tensor | Squares) -> torch.Tensor | Squares:
    """Copy a tensor with its strides: kernels round differently on another layout of memory.

    Otherwise a write of one group would change the last bits of its neighbours.
    """
    if isinstance(tensor, Squares):
        return tensor.clone()
    if _overlaps(tensor):  # an expanded one, whose copy must have all its elements
        return tensor.clone(memory_format=torch.contiguous_format)
    copy = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return copy.copy_(tensor)


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether two elements may lie in the same place, as in an expanded or unfolded tensor."""
    reached = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reached:
            return True
        reached += stride * (size - 1)
    return False
