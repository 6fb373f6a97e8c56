"""Values that stay on this shard between requests: what was kept, by scope and name.

All ranks compute equal values and are told the same in the same order, so every rank holds the full
value of everything. What a request keeps waits aside until the coordinator says that the request
has ended well: a rank alone can't know that, because the node of another may have failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ndif_actor.engine.ops import Value
from ndif_actor.messages import Dropped
from ndif_client.wire.messages import HeldSpec
from ndif_client.wire.tensors import TensorSpec


class HeldStore:
    """What this shard holds, and what the last pass would add to it."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, Value]] = {}
        self._waiting: dict[str, Holdings] = {}

    def find(self, scope: str, name: str) -> Value | None:
        """Return a held value, or None."""
        return self._held.get(scope, {}).get(name)

    def put_aside(self, request: str, holdings: Holdings) -> None:
        """Let what a request has kept wait for `settle`."""
        if holdings.kept:
            self._waiting[request] = holdings

    def settle(self, kept: Sequence[str], dropped: Sequence[Dropped]) -> None:
        """Hold what these requests have kept, in order, and then let go of what is dropped."""
        for request in kept:
            holdings = self._waiting.pop(request)
            self._held.setdefault(holdings.scope, {}).update(holdings.kept)
        for one in dropped:
            if one.names is None:
                self._held.pop(one.scope, None)
                continue
            held = self._held.get(one.scope, {})
            for name in one.names:
                held.pop(name, None)
            if not held:
                self._held.pop(one.scope, None)

    def forget_waiting(self) -> None:
        """Let go of what was never settled: its requests have failed, or were cancelled."""
        self._waiting.clear()


class Holdings:
    """One request's held values: those it uses, and those it keeps.

    Args:
        store: of this shard.
        scope: whose values they are.
        specs: what the values that it uses were when it was checked.
    """

    def __init__(self, store: HeldStore, scope: str, specs: Mapping[str, HeldSpec]) -> None:
        self.scope = scope
        self.specs = specs
        self.kept: dict[str, Value] = {}
        self._store = store

    def get(self, name: str, otherwise: Value | None = None) -> Value:
        """Return a held value, or what is given in its place; nobody may change it.

        Raises:
            LookupError: it is not there any more.
            ValueError: it is of another shape or dtype by now.
        """
        value = self._store.find(self.scope, name)
        if value is None and otherwise is not None:
            return otherwise
        if value is None:
            raise LookupError(
                f"{name!r} is not held any more: it was dropped, or lost when the model restarted; "
                "or it never was, as the generation that was to keep it ended before that"
            )
        found = spec_of(value)
        checked = self.specs[name] if otherwise is None else spec_of(otherwise)
        if found != checked:
            raise ValueError(
                f"{name!r} is {shown(found)} by now, and was {shown(checked)} when this was sent"
            )
        return value

    def keep(self, name: str, value: Value) -> None:
        """Copy a value, to be held when its request has ended well."""
        # What inference mode has made can never be saved for a backward pass.
        with torch.inference_mode(False):
            self.kept[name] = _copied(value)


def spec_of(value: Value) -> HeldSpec:
    """Describe a value, on any device."""
    if isinstance(value, tuple):
        return [_spec(item) for item in value]
    return _spec(value)


def from_spec(spec: HeldSpec) -> Value:
    """Return a value of that description without data."""
    if isinstance(spec, TensorSpec):
        return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
    return tuple(
        torch.empty(one.shape, dtype=getattr(torch, one.dtype), device="meta") for one in spec
    )


def shown(spec: HeldSpec) -> str:
    """Return a description as it is shown, such as "float32[2, 3]"."""
    if isinstance(spec, TensorSpec):
        return f"{spec.dtype}{list(spec.shape)}"
    return f"({', '.join(map(shown, spec))})"


def _spec(tensor: torch.Tensor) -> TensorSpec:
    # The names of wire dtypes are torch's own.
    name = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(name, tuple(tensor.shape))  # type: ignore[arg-type]


def _copied(value: Value) -> Value:
    if isinstance(value, tuple):
        return tuple(_copy(item) for item in value)
    return _copy(value)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
