"""What Python may ask of a value at once, and the server answers: shape, dtype, sizes."""

from __future__ import annotations

import math
import sys
from typing import Any

from ndif_client.errors import graph_error
from ndif_client.facts import facts_of
from ndif_client.values import Value, known_dtype

#: Properties that the server is asked for.
ASKED = frozenset(("dtype", "ndim", "shape"))


class Sized(Value):
    """A value whose shape and dtype can be asked for while its trace is written."""

    __slots__ = ()

    @property
    def shape(self) -> Any:
        """Its shape, for which the server is asked: a torch.Size, or a tuple without torch.

        Raises:
            ValueUnknownError: it is not the same at all of its steps, or nobody can be asked.
            NdifError: what has been recorded so far can never run.
        """
        info = facts_of(self)
        if info.items is not None:
            raise graph_error(
                f"this value is a tuple of {len(info.items)} tensors; use one of them"
            )
        torch = sys.modules.get("torch")
        return tuple(info.shape) if torch is None else torch.Size(info.shape)

    @property
    def dtype(self) -> Any:
        """Its dtype: torch's, or its name without torch; raises as `shape` does."""
        name = known_dtype(self) or facts_of(self).dtype
        torch = sys.modules.get("torch")
        return name if torch is None else getattr(torch, name)

    @property
    def device(self) -> Any:
        """The CPU: tensors made here can be used with it, wherever it is computed."""
        torch = sys.modules.get("torch")
        return "cpu" if torch is None else torch.device("cpu")

    @property
    def ndim(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    def dim(self) -> int:
        """Return how many dimensions it has."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """Return its shape, or the size of one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Return how many elements it has."""
        return math.prod(self.shape)

    nelement = numel

    def is_floating_point(self) -> bool:
        """Return whether it holds floats."""
        return (known_dtype(self) or facts_of(self).dtype).startswith(("float", "bfloat"))
