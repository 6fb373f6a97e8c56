"""Optimisers for values held on the server: torch's own rules, recorded as operations.

    adam = optim.Adam([weight, bias], lr=1e-3)
    async with session.chain() as chain:
        for prompts, labels in batches:
            with chain.trace(prompts) as trace:
                loss = ...                  # computed with weight and bias
                loss.backward()
                adam.step()

A step reads the gradients of the last backward and keeps the new values under the same names, with
the state of the optimiser beside them. The numbers are those of `torch.optim` in its default
settings, in the dtype of the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ndif_client import ops
from ndif_client.errors import graph_error
from ndif_client.held import Handle
from ndif_client.proxy import Proxy
from ndif_client.recorder import current_recorder


class Optimizer:
    """What all of them share: the parameters, and the steps that have been recorded.

    Attributes:
        parameters: the held values that it changes.
        lr: the learning rate; it may be changed between steps.
        steps: how many have been recorded.
    """

    def __init__(self, parameters: Iterable[Handle], lr: float) -> None:
        self.parameters = list(parameters)
        self.lr = lr
        self.steps = 0
        names = [_checked(parameter).name for parameter in self.parameters]
        if not names:
            raise graph_error("an optimiser needs values to change: handles of held values")
        if len(set(names)) < len(names):
            raise graph_error("a parameter is given twice")

    def step(self) -> None:
        """Record that the parameters are changed by their gradients in the last backward.

        Raises:
            GraphError: there is no backward before it, or the loss does not depend on a parameter.
        """
        current_recorder("step()").check_open()
        self.steps += 1
        for parameter in self.parameters:
            value = parameter._sole_value()
            new = self._update(parameter, value.detach(), value.grad)
            new.keep(parameter.name)

    def _update(self, parameter: Handle, value: Any, gradient: Any) -> Any:
        raise NotImplementedError

    def _state(self, parameter: Handle, what: str, value: Proxy) -> Proxy:
        """Return a part of the state of a parameter: zeros before the first step."""
        if self.steps == 1:
            zeros: Proxy = value.zeros_like()
            return zeros
        return _held(parameter, what)

    @staticmethod
    def _keep_state(parameter: Handle, what: str, value: Proxy) -> None:
        value.keep(f"{parameter.name}.{what}")


class SGD(Optimizer):
    """Stochastic gradient descent, as `torch.optim.SGD`.

    Args:
        parameters: held values.
        lr: learning rate.
        momentum, dampening, weight_decay, nesterov: as in torch.
    """

    def __init__(
        self,
        parameters: Iterable[Handle],
        lr: float = 1e-3,
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(parameters, lr)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise graph_error("nesterov=True needs a momentum, and no dampening")
        self.momentum = momentum
        self.dampening = dampening
        self.weight_decay = weight_decay
        self.nesterov = nesterov

    def _update(self, parameter: Handle, value: Any, gradient: Any) -> Any:
        if self.weight_decay:
            gradient = ops.add(gradient, value, alpha=self.weight_decay)
        if self.momentum:
            buffer = gradient
            if self.steps > 1:
                old = _held(parameter, "momentum")
                buffer = ops.add(old * self.momentum, gradient, alpha=1 - self.dampening)
            self._keep_state(parameter, "momentum", buffer)
            way = ops.add(gradient, buffer, alpha=self.momentum) if self.nesterov else buffer
            return ops.add(value, way, alpha=-self.lr)
        return ops.add(value, gradient, alpha=-self.lr)


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015), as `torch.optim.Adam`.

    Args:
        parameters: held values.
        lr: learning rate.
        betas, eps, weight_decay: as in torch.
    """

    def __init__(
        self,
        parameters: Iterable[Handle],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, lr)
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay

    def _update(self, parameter: Handle, value: Any, gradient: Any) -> Any:
        value, gradient = self._decayed(value, gradient)
        first, second = self.betas
        mean = self._state(parameter, "mean", value).lerp(gradient, 1 - first)
        old = self._state(parameter, "square", value) * second
        square = old.addcmul(gradient, gradient, value=1 - second)
        self._keep_state(parameter, "mean", mean)
        self._keep_state(parameter, "square", square)
        step_size = self.lr / (1 - first**self.steps)
        root = square.sqrt() / math.sqrt(1 - second**self.steps)
        return value.addcdiv(mean, root + self.eps, value=-step_size)

    def _decayed(self, value: Any, gradient: Any) -> tuple[Any, Any]:
        if self.weight_decay:
            gradient = ops.add(gradient, value, alpha=self.weight_decay)
        return value, gradient


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), as `torch.optim.AdamW`."""

    def __init__(
        self,
        parameters: Iterable[Handle],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(parameters, lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _decayed(self, value: Any, gradient: Any) -> tuple[Any, Any]:
        return value * (1 - self.lr * self.weight_decay), gradient


def _held(parameter: Handle, what: str) -> Proxy:
    return parameter._holder.handle(f"{parameter.name}.{what}")._sole_value()


def _checked(parameter: Any) -> Handle:
    if not isinstance(parameter, Handle):
        raise graph_error(
            f"an optimiser changes held values, not {type(parameter).__name__}: upload it first, "
            "session.upload(array, name=...)"
        )
    return parameter
