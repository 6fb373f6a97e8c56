"""Optimisers for values held on the server: torch's own rules, recorded as operations.

    adam = optim.Adam([weight, bias], lr=1e-3)
    async with session.chain() as chain:
        for prompts, labels in batches:
            with chain.trace(prompts) as trace:
                loss = ...                  # computed with weight and bias
                loss.backward()
                adam.step()

A step reads the gradients of its trace and keeps the new values under the same names; the state of
the optimiser (moments, the count of steps that have run) is held beside them, so a step that failed
or was never sent has not happened. The numbers are those of `torch.optim`, in the dtype of the
values.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from ndif_client import ops
from ndif_client.errors import ClosedTraceError, graph_error
from ndif_client.gradients import BackwardBlock, influencing
from ndif_client.held import Handle
from ndif_client.proxy import Proxy
from ndif_client.recorder import Recorder, current_recorder

#: Held values, or groups of them with options of their own, as torch has them.
Parameters = Iterable[Handle | dict[str, Any]]


class Optimizer:
    """What all of them share: parameters, and their gradients in a trace.

    Attributes:
        param_groups: as torch's: each has its "params" and its options, such as "lr", which may be
            changed between steps.
        parameters: the held values that it changes, of all groups.
    """

    #: What is held beside each parameter.
    _state_names: tuple[str, ...] = ()

    def __init__(
        self,
        parameters: Parameters,
        options: dict[str, Any],
        state: Mapping[str, Handle] | None,
    ) -> None:
        if isinstance(parameters, Handle):
            raise graph_error("an optimiser takes a list of held values: [handle]")
        given = list(parameters)
        groups = [one if isinstance(one, dict) else {"params": [one]} for one in given]
        if not any(isinstance(one, dict) for one in given):
            groups = [{"params": given}] if given else []
        self.param_groups = [{**options, **group, "params": list(group["params"])}
                             for group in groups]  # fmt: skip
        self.parameters = [_checked(p) for group in self.param_groups for p in group["params"]]
        for group in self.param_groups:
            self._check(group)
        names = [parameter.name for parameter in self.parameters]
        if not names:
            raise graph_error("an optimiser needs values to change: handles of held values")
        if len(set(names)) < len(names):
            raise graph_error("a parameter is given twice")
        self._begins_with = dict(state or {})
        holder = self.parameters[0]._holder
        self.state = {
            f"{name}.{what}": Handle(holder, uuid.uuid4().hex, own=True)
            for name in names
            for what in self._state_names
        }
        #: how many backwards of the open trace are forgotten, and what its gradients are scaled by
        self._recorder: weakref.ref[Recorder] | None = None
        self._forgotten = 0
        self._scale: Proxy | None = None

    @property
    def lr(self) -> Any:
        """The learning rate of the first group; setting it sets that of all."""
        return self.param_groups[0]["lr"]

    @lr.setter
    def lr(self, lr: Any) -> None:
        for group in self.param_groups:
            group["lr"] = lr

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let the next step pass over the backwards that were recorded before.

        Without it, a step takes the sum of the gradients of all backwards of its trace, as in
        torch. Backwards of other traces never count.
        """
        with suppress(ClosedTraceError):
            recorder = self._open()
            self._forgotten = len(recorder.backwards)
            self._scale = None

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Proxy:
        """Have the next step scale its gradients down to a total norm; see torch's function.

        Returns:
            The norm that they have together.
        """
        recorder = self._open()
        backwards = self._backwards(recorder)
        gradients = [self._gradient(recorder, p, backwards) for p in self.parameters]
        norms = ops.stack([ops.vector_norm(gradient, norm_type) for gradient in gradients])
        total: Proxy = ops.vector_norm(norms, norm_type)
        self._scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
        return total

    def step(self) -> None:
        """Record that the parameters are changed by their gradients.

        Raises:
            GraphError: there is no backward before it, or the loss does not depend on a parameter.
        """
        recorder = self._open()
        recorder.check_open()
        scale, self._scale = self._scale, None
        backwards = self._backwards(recorder)
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = self._gradient(recorder, parameter, backwards)
                if scale is not None:
                    gradient = gradient * scale.type_as(gradient)
                if group["maximize"]:
                    gradient = -gradient
                value = parameter._sole_value().detach()
                self._update(parameter, value, gradient, group).keep(parameter.name)

    def _open(self) -> Recorder:
        """Return the recorder of the open trace; what was forgotten in another one is over."""
        recorder = current_recorder("an optimiser")
        if self._recorder is None or recorder is not self._recorder():
            self._recorder = weakref.ref(recorder)
            self._forgotten, self._scale = 0, None
        return recorder

    def _backwards(self, recorder: Recorder) -> dict[int, set[int]]:
        """Return the backwards that count, and the nodes that the loss of each depends on."""
        backwards = recorder.backwards[self._forgotten :]
        if not backwards:
            raise graph_error(
                "there is no backward before this step: call loss.backward() first, in its trace"
            )
        return {backward: influencing(recorder, backward) for backward in backwards}

    def _gradient(
        self, recorder: Recorder, parameter: Handle, backwards: Mapping[int, set[int]]
    ) -> Any:
        """Return the sum of a parameter's gradients in the backwards that count."""
        pairs = [(b, Proxy(recorder, recorder.held(parameter, before=b))) for b in backwards]
        # A loss that has nothing to do with a parameter adds nothing to its gradient; if none has,
        # the server says so.
        pairs = [(b, v) for b, v in pairs if v._node in backwards[b]] or pairs[-1:]
        total: Any = None
        for backward, value in pairs:
            with BackwardBlock(recorder, backward):
                gradient = value.grad
            total = gradient if total is None else total + gradient
        return total

    def _update(self, parameter: Handle, value: Any, gradient: Any, group: Any) -> Any:
        raise NotImplementedError

    def _check(self, group: Mapping[str, Any]) -> None:
        """Refuse options that can't be; raises GraphError."""
        if isinstance(group["lr"], int | float) and group["lr"] < 0:
            raise graph_error(f"lr={group['lr']}: a learning rate is not negative")

    def _state(self, parameter: Handle, what: str, zeros: Any) -> Any:
        """Return a part of the state of a parameter; where nothing is held yet, zeros."""
        key = f"{parameter.name}.{what}"
        begin = self._begins_with[key]._sole_value() if key in self._begins_with else zeros
        return self.state[key]._sole_value(begin)

    def _keep_state(self, parameter: Handle, what: str, value: Any) -> None:
        value.keep(self.state[f"{parameter.name}.{what}"].name)

    def _count(self, parameter: Handle) -> Any:
        """Return how many steps a parameter has had, this one included: a float64 number."""
        count = self._state(parameter, "steps", ops.zeros((), dtype="float64")) + 1
        self._keep_state(parameter, "steps", count)
        return count


class SGD(Optimizer):
    """Stochastic gradient descent, as `torch.optim.SGD`.

    Args:
        parameters: held values, or groups of them.
        lr: learning rate: a number, or a value.
        momentum, dampening, weight_decay, nesterov, maximize: as in torch.
        state: what to go on from: the `state` of another one, as it was downloaded and uploaded.
    """

    _state_names = ("momentum", "steps")

    def __init__(
        self,
        parameters: Parameters,
        lr: Any = 1e-3,
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        state: Mapping[str, Handle] | None = None,
    ) -> None:
        options = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize,
        }  # fmt: skip
        super().__init__(parameters, options, state)

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise graph_error("nesterov=True needs a momentum, and no dampening")

    def _update(self, parameter: Handle, value: Any, gradient: Any, group: Any) -> Any:
        if group["weight_decay"]:
            gradient = ops.add(gradient, value, alpha=group["weight_decay"])
        if group["momentum"]:
            buffer = self._momentum(parameter, gradient, group)
            self._keep_state(parameter, "momentum", buffer)
            nesterov = group["nesterov"]
            gradient = ops.add(gradient, buffer, alpha=group["momentum"]) if nesterov else buffer
        if isinstance(group["lr"], int | float):
            return ops.add(value, gradient, alpha=-group["lr"])
        return value - gradient * _like(group["lr"], value)

    def _momentum(self, parameter: Handle, gradient: Any, group: Any) -> Any:
        old = self._state(parameter, "momentum", gradient.zeros_like())
        buffer = ops.add(old * group["momentum"], gradient, alpha=1 - group["dampening"])
        if not group["dampening"]:
            return buffer
        return ops.where(self._count(parameter) > 1, buffer, gradient)


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015), as `torch.optim.Adam`.

    Args:
        parameters: held values, or groups of them.
        lr: learning rate: a number, or a value.
        betas, eps, weight_decay, amsgrad, maximize: as in torch.
        state: what to go on from: the `state` of another one, as it was downloaded and uploaded.
    """

    _state_names = ("mean", "square", "largest", "steps")

    def __init__(
        self,
        parameters: Parameters,
        lr: Any = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        maximize: bool = False,
        state: Mapping[str, Handle] | None = None,
    ) -> None:
        options = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "amsgrad": amsgrad, "maximize": maximize,
        }  # fmt: skip
        super().__init__(parameters, options, state)

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise graph_error(f"betas={group['betas']}: each is at least 0 and below 1")

    def _update(self, parameter: Handle, value: Any, gradient: Any, group: Any) -> Any:
        value, gradient = self._decayed(value, gradient, group)
        first, second = group["betas"]
        zeros = value.zeros_like()
        mean = self._state(parameter, "mean", zeros).lerp(gradient, 1 - first)
        old = self._state(parameter, "square", zeros) * second
        square = old.addcmul(gradient, gradient, value=1 - second)
        self._keep_state(parameter, "mean", mean)
        self._keep_state(parameter, "square", square)
        if group["amsgrad"]:
            square = ops.maximum(self._state(parameter, "largest", zeros), square)
            self._keep_state(parameter, "largest", square)
        count = self._count(parameter)
        step_size = group["lr"] / (1 - first**count)
        root = square.sqrt() / _like((1 - second**count).sqrt(), value)
        return value - mean * _like(step_size, value) / (root + group["eps"])

    def _decayed(self, value: Any, gradient: Any, group: Any) -> tuple[Any, Any]:
        if group["weight_decay"]:
            gradient = ops.add(gradient, value, alpha=group["weight_decay"])
        return value, gradient


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), as `torch.optim.AdamW`."""

    def __init__(
        self,
        parameters: Parameters,
        lr: Any = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
        state: Mapping[str, Handle] | None = None,
    ) -> None:
        super().__init__(
            parameters,
            lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            state=state,
        )

    def _decayed(self, value: Any, gradient: Any, group: Any) -> tuple[Any, Any]:
        return value * (1 - group["lr"] * group["weight_decay"]), gradient


def _like(number: Any, value: Any) -> Any:
    """Return a number on the server in the dtype of a value, of which it would make a wider one."""
    return ops.type_as(number, value)


def _checked(parameter: Any) -> Handle:
    if not isinstance(parameter, Handle):
        raise graph_error(
            f"an optimiser changes held values, not {type(parameter).__name__}: upload it first, "
            "session.upload(array, name=...)"
        )
    return parameter
