"""What saved values are called: structures of them, and the names of the user's variables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

from ndif_client.errors import graph_error
from ndif_client.proxy import Proxy
from ndif_client.recorder import Recorder
from ndif_client.results import RESERVED_NAMES, Layout, leaves
from ndif_client.values import Delegate


def save_structure(value: Any, recorder: Recorder, what: str) -> Layout:
    """Save a value, or every value of a list, tuple or dict, and return the layout.

    Raises:
        GraphError: there is something in it that is no value of this trace.
    """
    if isinstance(value, Delegate):
        value = value._sole_value()
    if isinstance(value, Proxy):
        if value._recorder is not recorder:
            raise graph_error(f"{what} is a value of another trace; it is saved there")
        value.save()
        assert value._saved is not None
        return value._saved
    if isinstance(value, Mapping):
        return {key: save_structure(item, recorder, what) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [save_structure(item, recorder, what) for item in value]
    raise graph_error(
        f"{what}: only values of the trace can be saved, and lists and dicts of them, not "
        f"{type(value).__name__}"
    )


def complete_names(recorder: Recorder, frame: FrameType | None) -> None:
    """Name the saves that have no name yet: after the variables of `frame`, else by position."""
    named = {number for layout in recorder.names.values() for number in leaves(layout)}
    nameless = [number for number in recorder.saves() if number not in named]
    if nameless and frame is not None:
        unnamed = set(nameless)
        for name, layout in _held(recorder, frame.f_locals):
            fits = all(number in unnamed for number in leaves(layout))
            if fits and name not in recorder.names and name not in RESERVED_NAMES:
                recorder.names[name] = layout
                nameless = [number for number in nameless if number not in leaves(layout)]
    order = {number: position for position, number in enumerate(recorder.saves())}
    for number in nameless:
        recorder.names.setdefault(str(order[number]), number)
    by_first_save = sorted(recorder.names.items(), key=lambda item: min(leaves(item[1]), default=0))
    recorder.names = dict(by_first_save)


def unsaved_variables(recorder: Recorder, frame: FrameType | None) -> list[str]:
    """Return the variables of `frame` that hold values of this trace that are not saved."""
    return [
        name
        for name, value in (frame.f_locals.items() if frame is not None else ())
        if isinstance(value, Proxy) and value._recorder is recorder and value._saved is None
    ]


def _held(recorder: Recorder, variables: Mapping[str, Any]) -> Iterable[tuple[str, Layout]]:
    """Yield the variables that hold saved values of this trace, or lists or dicts of them."""
    for name, value in list(variables.items()):
        if name.startswith("_"):
            continue
        layout = _layout(recorder, value)
        if layout is not None:
            yield name, layout


def _layout(recorder: Recorder, value: Any) -> Layout | None:
    if isinstance(value, Proxy):
        return value._saved if value._recorder is recorder else None
    if type(value) in (list, tuple) and value and isinstance(value[0], Proxy):
        items = [_layout(recorder, item) for item in value]
        return None if None in items else items  # type: ignore[return-value]
    if type(value) is dict and value and isinstance(next(iter(value.values())), Proxy):
        entries = {key: _layout(recorder, item) for key, item in value.items()}
        return None if None in entries.values() else entries  # type: ignore[return-value]
    return None
