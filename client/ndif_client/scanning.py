"""The shapes of everything in a trace, without running it."""

from __future__ import annotations

from typing import Any

from ndif_client.errors import graph_error
from ndif_client.recorder import Recorder
from ndif_client.results import Layout
from ndif_client.values import Delegate, Value, node_of
from ndif_client.wire.messages import ValueInfo


class Scan:
    """Shapes and dtypes of a trace's values, as they would be if it ran.

    `scan.shape_of(value)` and `scan.dtype_of(value)` take any value of the trace, `scan["name"]`
    gives the shape of a saved one, or a list or dict of them. Of a generation they are those of the
    prefill, or of the first later step for what runs later only.
    """

    def __init__(self, recorder: Recorder, values: list[ValueInfo | None]) -> None:
        self._recorder = recorder
        self._values = values
        self._names = dict(recorder.names)

    def shape_of(self, value: Any) -> Any:
        """Return the shape of a value, as a tuple; of a tuple of tensors, a tuple of shapes."""
        return _shape(self._info(value))

    def dtype_of(self, value: Any) -> Any:
        """Return the name of a value's dtype; of a tuple of tensors, a tuple of names."""
        return _dtype(self._info(value))

    def __getitem__(self, name: str) -> Any:
        """Return the shape of what is saved by that name.

        Raises:
            KeyError: nothing is.
        """
        if name not in self._names:
            raise KeyError(f"{name!r} is not saved; saved are {list(self._names)}")
        return self._build(self._names[name])

    def keys(self) -> list[str]:
        """Return the names of what is saved."""
        return list(self._names)

    def __repr__(self) -> str:
        lines = [f"  {name}: {self[name]}" for name in self._names]
        return "\n".join([f"Scan of {len(self._values)} operations", *lines])

    def _info(self, value: Any) -> ValueInfo:
        if isinstance(value, Delegate):
            value = value._sole_value()
        if not isinstance(value, Value):
            raise graph_error(f"{type(value).__name__} is no value of this trace")
        node = node_of(value, self._recorder)
        found = self._values[node] if node < len(self._values) else None
        if found is None:
            raise graph_error("this value was recorded after the scan; scan again")
        return found

    def _build(self, layout: Layout) -> Any:
        if isinstance(layout, int):
            info = self._values[self._recorder.saved_by(layout)]
            return None if info is None else _shape(info)
        if isinstance(layout, dict):
            return {key: self._build(value) for key, value in layout.items()}
        return [self._build(value) for value in layout]


def _shape(info: ValueInfo) -> Any:
    if info.items is not None:
        return tuple(map(_shape, info.items))
    return tuple(info.shape)


def _dtype(info: ValueInfo) -> Any:
    return info.dtype if info.items is None else tuple(map(_dtype, info.items))
