"""The inside of an attention module, head by head: `attn.heads[3].pattern`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from ndif_client.errors import UnknownNameError, graph_error
from ndif_client.outputs import read_hook, write_hook
from ndif_client.wire.graph import AttentionPort
from ndif_client.wire.messages import HookInfo

#: What passes inside of an attention; each has its heads along the second axis.
PORTS: tuple[str, ...] = get_args(AttentionPort)


class Heads:
    """The heads of an attention: all of them (`attn.heads.query`), or some (`attn.heads[0, 2]`).

    Attributes, all with the heads along their second axis if there are several:
        query, key: `[batch, heads, sequence, head_dim]`, after rotary embedding.
        value: likewise. Where query heads share keys and values (GQA), keys and values have fewer
            heads; `heads[h]` means those that query head h uses, and a write reaches all who do.
        scores: `[batch, heads, sequence, sequence]`, as they enter the softmax.
        pattern: likewise, the probabilities.
        result: `[batch, heads, sequence, head_dim]`, before the output projection.

    Each can be read, written (`heads[3].pattern[:] = 0`) and assigned.
    """

    def __init__(self, path: str, hooks: Mapping[str, HookInfo], index: Any = None) -> None:
        self._path = path
        self._hooks = hooks
        self._index = index

    def __len__(self) -> int:
        return self._count("query")

    def __iter__(self) -> Iterator[Heads]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, index: int | slice | Sequence[int]) -> Heads:
        if self._index is not None:
            raise graph_error(f"{self._title()} are chosen already; choose them from .heads itself")
        chosen = list(index) if isinstance(index, list | tuple | range) else index
        numbers = [chosen] if isinstance(chosen, int) else chosen
        if isinstance(numbers, list) and any(not -len(self) <= n < len(self) for n in numbers):
            raise graph_error(
                f"{self._path} has {len(self)} heads (0 to {len(self) - 1}), not {chosen!r}"
            )
        return Heads(self._path, self._hooks, chosen)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        whole = read_hook(self._path, self._hook(name))
        return whole if self._index is None else whole[self._subscript(name)]

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        elif self._index is None:
            write_hook(self._path, self._hook(name), value)
        else:
            read_hook(self._path, self._hook(name))[self._subscript(name)] = value

    def __dir__(self) -> list[str]:
        return list(self._hooks)

    def __repr__(self) -> str:
        return f"{self._title()}: {', '.join(self._hooks)}"

    def _title(self) -> str:
        return f"{self._path}.heads" + ("" if self._index is None else f"[{self._index}]")

    def _hook(self, name: str) -> HookInfo:
        if name not in self._hooks:
            raise graph_error(
                f"{self._title()} have no {name!r}; they have {', '.join(self._hooks)}",
                UnknownNameError,
            )
        return self._hooks[name]

    def _count(self, name: str) -> int:
        return int(self._hook(name).shape[1])

    def _subscript(self, name: str) -> tuple[Any, ...]:
        """Return the index of the chosen heads; of keys and values, of those they use."""
        shared = len(self) // self._count(name)
        index = self._index
        if shared > 1:
            chosen = range(len(self))[index] if isinstance(index, int | slice) else index
            if isinstance(chosen, int):
                index = chosen // shared
            else:
                index = sorted({n % len(self) // shared for n in chosen})
        return slice(None), index


def heads_of(path: str, hooks: Sequence[HookInfo]) -> Heads | None:
    """Return the heads of a module, or None if it is no attention that shows them."""
    inside: dict[str, HookInfo] = {
        hook.port: hook for hook in hooks if hook.port in PORTS and hook.call == 0
    }
    return Heads(path, inside) if inside else None
