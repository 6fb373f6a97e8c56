"""What came back from a trace: saved values by name, the prompts' tokens, what it cost.

The bytes lie where the transport has put them; a value becomes a tensor when it is first asked
for, so that torch is imported by whoever looks at a tensor and by nobody else.
"""

from __future__ import annotations

import difflib
from collections import namedtuple
from collections.abc import Iterator
from typing import Any, TypeAlias

from ndif_client.errors import NoValueError, ProtocolError, UnknownNameError
from ndif_client.wire.messages import Done, PromptTokens, SavedTensor, SavedTuple, Statistics
from ndif_client.wire.tensors import ArrayKind, TensorSpec, check_buffer, import_array

#: What a name stands for: the number of a save, or a list or dict of such.
Layout: TypeAlias = "int | list[Layout] | dict[str, Layout]"


class Result:
    """The outcome of one trace.

    Saved values are found by name (`result["hidden"]`, `result.hidden`) or by position
    (`result[0]`); `dict(result)` has them all.

    Attributes:
        id: the trace's.
        statistics: seconds queued and computed, and with how many others the forward was shared.
        prompts: for each invoke, for each of its prompts, the token ids and their texts.
    """

    def __init__(
        self, done: Done, buffers: list[memoryview], names: dict[str, Layout], tensors: ArrayKind
    ) -> None:
        self.id = done.id
        self.statistics: Statistics = done.statistics
        self.prompts: list[list[PromptTokens]] = done.prompts
        self._names = names
        self._tensors: ArrayKind = tensors
        self._buffers = buffers
        self._saved: dict[int, SavedTensor | SavedTuple] = {s.node: s for s in done.tensors}
        self._saved.update((s.node, s) for s in done.tuples)
        self._values: dict[int, Any] = {}
        for name, layout in names.items():
            for path, number in paths(layout, name):
                if number not in self._saved:
                    raise ProtocolError(f"the server did not send {path!r} (node {number})")

    @property
    def tokens(self) -> list[str]:
        """The text of each token of the prompt, where there is only one prompt."""
        return self._only_prompt().tokens

    @property
    def token_ids(self) -> list[int]:
        """The token ids of the prompt, where there is only one prompt."""
        return self._only_prompt().ids

    def keys(self) -> list[str]:
        """Return the names of the saved values, in the order they were saved."""
        return list(self._names)

    def __getitem__(self, key: str | int) -> Any:
        """Return a saved value by name or position.

        Raises:
            KeyError: no value has that name.
            IndexError: there are not so many.
        """
        if isinstance(key, int):
            names = list(self._names)
            if not -len(names) <= key < len(names):
                raise IndexError(f"result {key} of {len(names)}: saved are {names}")
            key = names[key]
        if key not in self._names:
            raise KeyError(f"{key!r} was not saved; saved are {list(self._names)}")
        return self._build(self._names[key])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._names:
            saved = list(self._names) if not name.startswith("_") else []
            near = difflib.get_close_matches(name, saved, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; saved are {saved}"
            raise UnknownNameError(f"{name!r} was not saved{hint}")
        return self[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(name for name in self._names if name.isidentifier())]

    def __repr__(self) -> str:
        cost = self.statistics
        lines = [f"Result({len(self)} saved, forward {cost.forward} shared by {cost.groups})"]
        width = max(map(len, self._names), default=0)
        for name, layout in self._names.items():
            lines.append(f"  {name:<{width}}  {self._describe(layout)}")
        return "\n".join(lines)

    def saved(self, number: int) -> Any:
        """Return the value of one save by its number in the graph.

        Raises:
            NoValueError: there is no such save.
        """
        if number not in self._saved:
            raise NoValueError("this value was not saved; call .save() on it inside of the trace")
        if number not in self._values:
            self._values[number] = self._import(self._saved[number])
        return self._values[number]

    def _only_prompt(self) -> PromptTokens:
        prompts = [prompt for invoke in self.prompts for prompt in invoke]
        if len(prompts) != 1:
            raise NoValueError(
                f"this trace has {len(prompts)} prompts; use result.prompts[invoke][i].tokens"
            )
        return prompts[0]

    def _build(self, layout: Layout) -> Any:
        if isinstance(layout, int):
            return self.saved(layout)
        if isinstance(layout, dict):
            return {key: self._build(value) for key, value in layout.items()}
        return [self._build(value) for value in layout]

    def _import(self, saved: SavedTensor | SavedTuple) -> Any:
        if isinstance(saved, SavedTensor):
            return self._array(saved.tensor)
        items = [self._array(spec) for spec in saved.items]
        if len(saved.fields) != len(items):
            return tuple(items)
        return namedtuple("SavedFields", saved.fields)(*items)

    def _array(self, spec: TensorSpec) -> Any:
        return import_array(spec, check_buffer(spec, self._buffers), self._tensors)

    def _describe(self, layout: Layout) -> str:
        if not isinstance(layout, int):
            kind = "dict" if isinstance(layout, dict) else "list"
            return f"{kind} of {len(layout)}"
        saved = self._saved[layout]
        specs = [saved.tensor] if isinstance(saved, SavedTensor) else saved.items
        return ", ".join(f"{spec.dtype}{list(spec.shape)}" for spec in specs)


#: Names that a saved value can't have, because every result has its own attribute of that name.
RESERVED_NAMES = frozenset(
    (*(name for name in vars(Result) if not name.startswith("_")), "id", "statistics", "prompts")
)


def paths(layout: Layout, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield each save of a layout with its full name, such as "hidden.3"."""
    if isinstance(layout, int):
        yield prefix, layout
        return
    items = layout.items() if isinstance(layout, dict) else enumerate(layout)
    for key, value in items:
        yield from paths(value, f"{prefix}.{key}" if prefix else str(key))


def leaves(layout: Layout) -> list[int]:
    """Return the numbers of all saves in a layout."""
    return [number for _, number in paths(layout, "")]
