"""What came back: saved values by name, the prompts' tokens, what was generated, what it cost.

The bytes lie where the transport has put them; a value becomes a tensor when it is first asked
for, so that torch is imported by whoever looks at a tensor and by nobody else.
"""

from __future__ import annotations

import difflib
import reprlib
from collections import namedtuple
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from ndif_client.errors import NoValueError, ProtocolError, UnknownNameError
from ndif_client.steps import PREFILL_BLOCK, Block
from ndif_client.wire.messages import (
    Completion,
    Done,
    PromptTokens,
    SavedTensor,
    SavedTuple,
    Statistics,
)
from ndif_client.wire.tensors import ArrayKind, TensorSpec, check_buffer, import_array

#: What a name stands for: the number of a save, or a list or dict of such.
Layout: TypeAlias = "int | list[Layout] | dict[Any, Layout]"

#: Completions that `repr` shows, and characters of each.
_SHOWN = 4
_SHOWN_CHARACTERS = 60


class Result:
    """The outcome of one trace or generation.

    Saved values are found by name (`result["hidden"]`, `result.hidden`) or by position
    (`result[0]`); `dict(result)` has them all. A value saved in a block of many steps is a list
    with one entry for each step reached; `steps(name)` says which steps these are.

    Attributes:
        id: the trace's.
        statistics: seconds queued and computed, and with how many others the forward was shared.
        prompts: for each invoke, for each of its prompts, the token ids and their texts.
        completions: what was generated after each of these prompts: text, ids, tokens, and why it
            ended; empty for a trace.
    """

    def __init__(
        self,
        done: Done,
        buffers: list[memoryview],
        names: dict[str, Layout],
        tensors: ArrayKind,
        blocks: Mapping[int, Block] | None = None,
        conditional: frozenset[int] = frozenset(),
        failure: Exception | None = None,
    ) -> None:
        self.id = done.id
        self.statistics: Statistics = done.statistics
        self.prompts: list[list[PromptTokens]] = done.prompts
        self.completions: list[list[Completion]] = done.completions
        self._names = names
        self._tensors: ArrayKind = tensors
        self._buffers = buffers
        self._blocks = blocks or {}
        self._conditional = conditional
        self._failure = failure
        self._saved: dict[int, dict[int, SavedTensor | SavedTuple]] = {}
        everything: list[SavedTensor | SavedTuple] = [*done.tensors, *done.tuples]
        for saved in sorted(everything, key=lambda saved: saved.step):
            self._saved.setdefault(saved.node, {})[saved.step] = saved
        self._values: dict[int, Any] = {}
        # The shortest: what was saved of a sequence ends with it, though others may go on.
        reached = min((len(each.ids) for each in self._sequences()), default=1)
        for name, layout in names.items():
            for path, number in paths(layout, name):
                if number in conditional or failure is not None:
                    continue
                expected = self._block(number).steps
                for step in range(expected.start, reached, expected.stride):
                    if step in expected and step not in self._saved.get(number, {}):
                        where = f"node {number}, step {step}" if step else f"node {number}"
                        raise ProtocolError(f"the server did not send {path!r} ({where})")

    @property
    def tokens(self) -> list[str]:
        """The text of each token of the prompt, where there is only one prompt."""
        return self._only_prompt().tokens

    @property
    def token_ids(self) -> list[int]:
        """The token ids of the prompt, where there is only one prompt."""
        return self._only_prompt().ids

    @property
    def completion(self) -> Completion:
        """What was generated, where there is only one prompt.

        Raises:
            NoValueError: there are several, or this was a trace.
        """
        completions = self._sequences()
        if len(completions) != 1:
            raise NoValueError(
                f"there are {len(completions)} completions; use result.completions[invoke][i]"
                if completions
                else "a trace generates nothing; use session.generate(...)"
            )
        return completions[0]

    @property
    def text(self) -> str:
        """The generated text, where there is only one prompt; raises as `completion` does."""
        return self.completion.text

    @property
    def new_ids(self) -> list[int]:
        """The generated token ids, where there is only one prompt; raises as `completion` does."""
        return self.completion.ids

    @property
    def new_tokens(self) -> list[str]:
        """The text of each generated token, where there is only one prompt."""
        return self.completion.tokens

    def steps(self, name: str) -> list[int]:
        """Return the steps at which a saved value was reached: those of its list, in order.

        Raises:
            KeyError: no value has that name.
        """
        reached = [self._saved.get(n, {}) for n in leaves(self._layout(name))]
        return sorted({step for steps in reached for step in steps})

    def keys(self) -> list[str]:
        """Return the names of the saved values, in the order they were saved."""
        return list(self._names)

    def values(self) -> list[Any]:
        """Return the saved values, in the order they were saved; raises as `result[name]` does."""
        return [self[name] for name in self._names]

    def items(self) -> list[tuple[str, Any]]:
        """Return name and value of all saved values; raises as `result[name]` does."""
        return [(name, self[name]) for name in self._names]

    def get(self, name: str, default: Any = None) -> Any:
        """Return a saved value, or `default` if none has that name or it was not reached."""
        try:
            return self[name]
        except (KeyError, NoValueError):
            return default

    def __getitem__(self, key: str | int) -> Any:
        """Return a saved value by name or position.

        Raises:
            KeyError: no value has that name.
            IndexError: there are not so many.
            NoValueError: the generation ended before its step.
        """
        if isinstance(key, int):
            names = list(self._names)
            if not -len(names) <= key < len(names):
                raise IndexError(f"result {key} of {len(names)}: saved are {names}")
            key = names[key]
        return self._build(self._layout(key))

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
        completions = self._sequences()
        for each in completions[:_SHOWN]:
            lines.append(f"  {_shortened(each.text)} ({len(each.ids)} tokens, {each.finish})")
        if len(completions) > _SHOWN:
            lines.append(f"  and {len(completions) - _SHOWN} more completions")
        width = max(map(len, self._names), default=0)
        for name, layout in self._names.items():
            lines.append(f"  {name:<{width}}  {self._describe(layout)}")
        return "\n".join(lines)

    def saved(self, number: int) -> Any:
        """Return the value of one save by its number in the graph.

        Raises:
            NoValueError: there is no such save, or the generation ended before its step.
        """
        block = self._block(number)
        if number not in self._saved and not block.as_list:
            raise NoValueError(self._why_absent(number))
        if number not in self._values:
            values = [self._import(saved) for saved in self._saved.get(number, {}).values()]
            self._values[number] = values if block.as_list else values[0]
        return self._values[number]

    def _raw(self, name: str) -> tuple[SavedTensor | SavedTuple, list[memoryview]]:
        """Return what one save of a trace has sent, and the buffers it refers to."""
        (number,) = leaves(self._layout(name))
        return self._saved[number][0], self._buffers

    def _block(self, number: int) -> Block:
        return self._blocks.get(number, PREFILL_BLOCK)

    def _sequences(self) -> list[Completion]:
        return [completion for invoke in self.completions for completion in invoke]

    def _layout(self, name: str) -> Layout:
        if name not in self._names:
            raise KeyError(f"{name!r} was not saved; saved are {list(self._names)}")
        return self._names[name]

    def _why_absent(self, number: int) -> str:
        if self._failure is not None:
            return f"there is no value, because the trace has failed before: {self._failure}"
        if number in self._conditional:
            return "this value was not made, because its condition did not hold"
        if number not in self._blocks or not self.completions:
            return "this value was not saved; call .save() on it inside of the trace"
        steps = self._block(number).steps
        ended = [each for each in self._sequences() if len(each.ids) <= steps.start]
        if not ended:
            return f"the server did not send what was saved at {steps} (node {number})"
        longest = max(ended, key=lambda each: len(each.ids))
        count = len(longest.ids)
        return (
            f"the generation ended after {count} token{'s' if count != 1 else ''} "
            f"({longest.finish}), before {steps}"
        )

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
        found = list(self._saved.get(layout, {}).values())
        if not found:
            return "not reached"
        specs = [found[0].tensor] if isinstance(found[0], SavedTensor) else found[0].items
        each = ", ".join(f"{spec.dtype}{list(spec.shape)}" for spec in specs)
        if not self._block(layout).as_list:
            return each
        return f"{len(found)} step{'s' if len(found) != 1 else ''}, the first {each}"


#: Names that a saved value can't have, because every result has its own attribute of that name.
RESERVED_NAMES = frozenset(
    (
        *(name for name in vars(Result) if not name.startswith("_")),
        *("completions", "id", "prompts", "statistics"),
    )
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


def _shortened(text: str) -> str:
    shortener = reprlib.Repr()
    shortener.maxstring = _SHOWN_CHARACTERS
    return shortener.repr(text)
