"""What enters and leaves a module, or an operation inside of one, to be read and written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ndif_client.errors import graph_error
from ndif_client.outputs import HookTuple, read_hook, write_hook
from ndif_client.wire.graph import Port
from ndif_client.wire.messages import HookInfo

#: Names under which everything with ports has them.
PORT_NAMES = ("input", "inputs", "output", "outputs")


class Ports:
    """The hook points of one call of something."""

    def __init__(self, path: str, hooks: Sequence[HookInfo], call: int) -> None:
        self._path = path
        self._hook_infos = hooks
        self._call = call

    @property
    def output(self) -> Any:
        """What it returns: a value, or a `HookTuple` where it is a tuple or mapping.

        Assigning replaces it: `module.output = value`. Each access reads anew, so it sees what
        was written before it.
        """
        infos = self._hooks("output")
        if len(infos) == 1 and infos[0].leaf == "":
            return read_hook(self._path, infos[0])
        return HookTuple(self._path, infos)

    @property
    def outputs(self) -> HookTuple:
        """All tensors of the output, by their place in it."""
        return HookTuple(self._path, self._hooks("output"))

    @property
    def input(self) -> Any:
        """The first tensor it is called with; assigning replaces it."""
        return read_hook(self._path, self._first_input())

    @property
    def inputs(self) -> HookTuple:
        """All tensors it is called with: `inputs.args[0]`, `inputs.kwargs["mask"]`."""
        return HookTuple(self._path, self._hooks("input"))

    def _check_call(self, call: int) -> None:
        calls = {hook.call for hook in self._hook_infos}
        if call not in calls:
            raise graph_error(f"{self._title()} is called {len(calls)} time(s) in a forward")

    def _hooks(self, port: Port) -> list[HookInfo]:
        hooks = [h for h in self._hook_infos if h.port == port and h.call == self._call]
        if not hooks:
            raise graph_error(self._absent(port))
        return hooks

    def _first_input(self) -> HookInfo:
        hooks = self._hooks("input")
        return next((h for h in hooks if h.leaf == "args.0"), hooks[0])

    def _assign(self, name: str, value: Any) -> None:
        """Write to the port of that name; one of `PORT_NAMES`."""
        if name == "output":
            self._write_output(value)
        elif name == "input":
            write_hook(self._path, self._first_input(), value)
        else:
            raise graph_error(
                f"write one of the {name}: {self._title()}.{name}[...] = value, or .args[0] = "
                "value for inputs"
            )

    def _write_output(self, value: Any) -> None:
        infos = self._hooks("output")
        if len(infos) == 1 and not isinstance(value, tuple | list):
            write_hook(self._path, infos[0], value)
            return
        if len(infos) == 1 and infos[0].leaf == "":
            write_hook(self._path, infos[0], value)
            return
        parts = HookTuple(self._path, infos)
        if not isinstance(value, tuple | list):
            raise graph_error(f"{parts!r}\nwrite one of them, or assign a tuple of all")
        given = {parts._step(index): part for index, part in enumerate(value) if part is not None}
        for step, part in given.items():
            parts[step] = part

    # ------------------------------------------------------------ errors

    def _title(self) -> str:
        raise NotImplementedError

    def _absent(self, port: Port) -> str:
        """Say why there is nothing at a port."""
        raise NotImplementedError
