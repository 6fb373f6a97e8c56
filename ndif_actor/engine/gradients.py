"""The backwards of a pass: one run of autograd for all groups, and their programs inside it.

Rows are independent, so each loss is a root of its own and each group gets its own gradients only.
The first backwards of all groups run together, then the second ones, and so on. A group's nodes
run when the gradients they wait for are known, and may replace these. What autograd refuses for
one group fails that group alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ndif_actor.engine import ops
from ndif_actor.engine.backward import BackwardPlan
from ndif_actor.engine.execution import Differentiated, Execution, Flow
from ndif_actor.errors import ReplicaLost


def differentiate(executions: Sequence[Execution], *, is_sharded: bool) -> None:
    """Run the backwards of all programs, after the forward.

    Args:
        executions: of the pass; those that have failed are passed over.
        is_sharded: whether autograd runs collectives, all ranks at once.

    Raises:
        ReplicaLost: another shard is gone.
        torch.OutOfMemoryError: the device's memory does not suffice.
    """
    rounds = max((len(one.plan.backwards) for one in executions), default=0)
    for number in range(rounds):
        turns = [
            _Turn(one, one.plan.backwards[number])
            for one in executions
            if number < len(one.plan.backwards)
        ]
        _run([turn for turn in turns if turn.starts()], is_sharded=is_sharded)


class _Turn:
    """One group's part in a round: what it differentiates, and what it waits for."""

    def __init__(self, execution: Execution, plan: BackwardPlan) -> None:
        self.execution = execution
        self._plan = plan
        #: what each moment has made of its gradient; one that has run does not run again
        self._known: dict[int, torch.Tensor] = {}
        #: gradients that came before those of values made later, which the program looks at first
        self._early: dict[int, torch.Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.about: Differentiated

    def starts(self) -> bool:
        """Run the nodes before it; return whether there is something to differentiate."""
        if self.execution.fault is not None:
            self.execution.run(self._plan.order, None)
            return False
        try:
            self.about = self.execution.begin_backward(self._plan)
        except KeyError:
            return False
        if not self._plan.moments:
            return False
        if not self.about.loss.requires_grad:
            message = (
                "there is nothing to differentiate: no value whose gradient is asked for leads to "
                "this one by operations that have a gradient"
            )
            self.execution.fail(self._plan.node, message)
            return False
        return True

    @property
    def begins_with(self) -> torch.Tensor:
        """The gradient of the loss."""
        given = self.about.gradient
        if given is None:
            return torch.ones_like(self.about.loss)
        return given.detach().to(self.about.loss.dtype)

    def listen(self) -> None:
        """Be called with the gradients of the watched values."""
        for place, watched in enumerate(self.about.watched):
            if isinstance(watched, Flow):
                self._handles.append(watched.tensor.register_hook(self._flowing(place, watched)))
            else:

                def arrive(gradient: torch.Tensor, place: int = place) -> torch.Tensor | None:
                    return self._arrive(place, gradient)

                self._handles.append(watched.register_hook(arrive))

    def _flowing(self, place: int, flow: Flow) -> Callable[[torch.Tensor], torch.Tensor | None]:
        def arrive(gradient: torch.Tensor) -> torch.Tensor | None:
            own = flow.value(gradient)
            changed = self._arrive(place, own)
            if changed is None or changed is own:
                return None
            return flow.with_value(gradient, changed)

        return arrive

    def ignore(self) -> None:
        """Be called no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def finish(self) -> None:
        """Fail if a gradient that was asked for has not come."""
        for place in range(len(self._plan.moments)):
            if self.execution.fault is not None:
                return
            if place in self._early:
                self._known[place] = self._take(place, self._early.pop(place))
            elif place not in self._known:
                self._fail_at(place)
        self.execution.finish_gradients()

    def fail(self, error: Exception) -> None:
        """Fail because of what autograd says."""
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        self.execution.fail(self._plan.node, f"backward: {text}")

    def _arrive(self, place: int, gradient: torch.Tensor) -> torch.Tensor | None:
        if self.execution.fault is not None:
            return None
        if place in self._known:
            return self._known[place]
        absent = next((i for i in range(place) if i not in self._known), None)
        if absent is not None:
            value, _ = self._plan.moments[place]
            if not self.execution.program.writes_gradient(self._plan.node, value):
                self._early[place] = gradient
                return gradient
        changed = self._take(place, gradient, early=absent is not None)
        if self.execution.fault is not None:
            return None
        self._known[place] = changed
        return changed

    def _take(self, place: int, gradient: torch.Tensor, *, early: bool = False) -> torch.Tensor:
        value, order = self._plan.moments[place]
        return self.execution.take_gradient(self._plan.node, value, order, gradient, early=early)

    def _fail_at(self, place: int) -> None:
        value, _ = self._plan.moments[place]
        self.execution.fail(
            self._plan.node,
            "what is differentiated does not depend on a value whose gradient is asked for",
            value,
        )


def _run(turns: Sequence[_Turn], *, is_sharded: bool) -> None:
    try:
        try:
            _differentiate(turns, listen=True)
        except ops.REFUSALS as error:
            _fail_the_guilty(turns, error, is_sharded=is_sharded)
            _differentiate([turn for turn in turns if turn.execution.fault is None], listen=True)
    finally:
        for turn in turns:
            turn.ignore()
    for turn in turns:
        turn.finish()


def _fail_the_guilty(turns: Sequence[_Turn], error: Exception, *, is_sharded: bool) -> None:
    """Differentiate for each group by itself, and fail those that autograd refuses."""
    if is_sharded and _is_of_a_peer(error):
        raise ReplicaLost(f"the shards lost each other: {error}") from error
    for turn in turns:
        turn.ignore()
    if len(turns) == 1:
        turns[0].fail(error)
        return
    for turn in turns:
        try:
            _differentiate([turn], listen=False)
        except ops.REFUSALS as own:
            if is_sharded and _is_of_a_peer(own):
                raise ReplicaLost(f"the shards lost each other: {own}") from own
            turn.fail(own)
    if all(turn.execution.fault is None for turn in turns):
        raise error


def _differentiate(turns: Sequence[_Turn], *, listen: bool) -> None:
    if not turns:
        return
    if listen:
        for turn in turns:
            turn.listen()
    torch.autograd.grad(
        [turn.about.loss for turn in turns],
        [
            watched.tensor if isinstance(watched, Flow) else watched
            for turn in turns
            for watched in turn.about.watched
        ],
        [turn.begins_with for turn in turns],
        retain_graph=True,
        allow_unused=True,
    )


def _is_of_a_peer(error: Exception) -> bool:
    """Whether a collective failed; gloo says so in a bare RuntimeError."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection closed by peer", "timed out"))
