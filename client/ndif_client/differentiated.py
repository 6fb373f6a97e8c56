"""The backwards of a trace while it is written, and the gradients that are read and written."""

from __future__ import annotations

import warnings

from ndif_client.nodes import Nodes
from ndif_client.steps import AFTER_FORWARD
from ndif_client.wire.graph import (
    Argument,
    Backward,
    ReadGradient,
    Ref,
    Source,
    WriteGradient,
)


class Differentiated(Nodes):
    """The part of a recorder that knows backwards.

    Attributes:
        backward: number of the node whose gradients `.grad` means now.
        backwards: numbers of all of them.
        local_gradients: lines that use tensors of this machine which require gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backward: int | None = None
        self.backwards: list[int] = []
        self.local_gradients: list[Source] = []
        self._gradient_writes: dict[tuple[int, int], int] = {}

    def differentiate(self, loss: int, gradient: int | None) -> int:
        """Record a backward; `.grad` means its gradients from now on."""
        start = None if gradient is None else Ref(gradient)
        self.backward = self.add(Backward(Ref(loss), start), AFTER_FORWARD)
        self.backwards.append(self.backward)
        self.warn_of_local_gradients()
        return self.backward

    def warn_of_local_gradients(self) -> None:
        """Say that no gradient comes back to tensors of this machine that want one."""
        if self.backwards and self.local_gradients:
            first, self.local_gradients = self.local_gradients[0], []
            warnings.warn(
                "a tensor of this machine that requires a gradient is used in a trace with a "
                "backward, where it is a constant: to train it, session.upload it and use the "
                f"handle (ndif_client.optim); if it is none, give .detach()\n  at {first}",
                UserWarning,
                stacklevel=2,
            )

    def read_gradient(self, of: int) -> int:
        """Record a read of a value's gradient and return the node's number."""
        assert self.backward is not None
        return self.add(ReadGradient(self.backward, Ref(of)), AFTER_FORWARD)

    def write_gradient(self, backward: int, of: int, value: Argument) -> int:
        """Record a write of a value's gradient and return the node's number."""
        number = self.add(WriteGradient(backward, Ref(of), value), AFTER_FORWARD)
        self._gradient_writes[backward, of] = number
        return number

    def last_gradient_write(self, backward: int, of: int) -> int | None:
        """Return the number of the last write of a value's gradient."""
        return self._gradient_writes.get((backward, of))
