"""The operations inside of a module's forward, by the names they have beside its source."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from ndif_client.errors import UnknownNameError, graph_error
from ndif_client.ports import PORT_NAMES, Ports
from ndif_client.wire.graph import Port
from ndif_client.wire.messages import ForwardInfo, OperationInfo


class Operation(Ports):
    """One operation: `attn.source.apply_rotary_pos_emb_0`.

    It has `output`, `outputs`, `input` and `inputs` as a module has. Where a method of a tensor is
    called, that tensor is the first input: of `x.transpose(1, 2)`, `inputs.args[0]` is `x`.
    """

    def __init__(self, info: OperationInfo, path: str, first_order: int, call: int = 0) -> None:
        hooks = [
            replace(hook, operation=info.name, order=hook.order + first_order)
            for hook in info.hooks
        ]
        super().__init__(path, hooks, call)
        self._info = info
        self._first_order = first_order

    def at_call(self, call: int) -> Operation:
        """Return the same operation at its `call`-th run (from 0) within one forward."""
        self._check_call(call)
        return Operation(self._info, self._path, self._first_order, call)

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                object.__setattr__(self, name, value)
            elif name in PORT_NAMES:
                self._assign(name, value)
            else:
                raise graph_error(
                    f"{self._title()} has no {name!r} to write; it has input and output",
                    UnknownNameError,
                )

    def __repr__(self) -> str:
        lines = [f"{self._title()} (line {self._info.line + 1} of the forward):"]
        for hook in self._hook_infos:
            if hook.call == self._call:
                place = f"{hook.port}[{hook.leaf}]" if hook.leaf else hook.port
                lines.append(f"  {place}: {hook.dtype}[{', '.join(map(str, hook.shape))}]")
        return "\n".join(lines)

    def _title(self) -> str:
        return f"{self._path}.source.{self._info.name}".lstrip(".")

    def _absent(self, port: Port) -> str:
        why = self._info.withheld or f"no tensor with an axis of tokens is in its {port}"
        return f"nothing of {self._title()}.{port} can be touched here: {why}"


class Operations:
    """All operations of a forward: `print(attn.source)` shows each name at its line.

    Operations are attributes; iterating gives their names.
    """

    def __init__(self, info: ForwardInfo, path: str, first_order: int) -> None:
        self._forward = info
        self._path = path
        self._first_order = first_order
        self._named = {operation.name: operation for operation in info.operations}

    def __getitem__(self, name: str) -> Operation:
        if name not in self._named:
            near = difflib.get_close_matches(name, self._named, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise graph_error(
                f"{self._title()} has no operation {name!r}{hint} it has "
                f"{', '.join(self._named) or 'none that shows tensors'}",
                UnknownNameError,
            )
        return Operation(self._named[name], self._path, self._first_order)

    def __getattr__(self, name: str) -> Operation:
        # An operation may be named after a private method: `_norm_0`.
        if name.startswith("_") and name not in self.__dict__.get("_named", ()):
            raise AttributeError(name)
        return self[name]

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            if not name.startswith("_"):
                raise graph_error(
                    f"write the output or an input of it: {self._title()}.{name}.output = value"
                )
            object.__setattr__(self, name, value)

    def all(self) -> Iterator[Operation]:
        """Yield every operation."""
        return (self[name] for name in self._named)

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    def __contains__(self, name: object) -> bool:
        return name in self._named

    def __dir__(self) -> list[str]:
        return list(self._named)

    def __repr__(self) -> str:
        """Return the source of the forward with the operations' names beside their lines."""
        beside: dict[int, list[str]] = {}
        for operation in self._forward.operations:
            beside.setdefault(operation.line, []).append(operation.name)
        width = max(map(len, self._named), default=0)
        lines = []
        for number, line in enumerate(self._forward.source.splitlines()):
            first, *others = beside.get(number, [""])
            arrow = "->" if first else "  "
            lines.append(f"{first:{width}} {arrow} {number + 1:3} {line}".rstrip())
            lines += [f"{name:{width}} ->   +" for name in others]
        return "\n".join(lines)

    def _title(self) -> str:
        return f"{self._path}.source".lstrip(".")
