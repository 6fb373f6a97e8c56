"""The inside of an attention as hook points: its queries, keys, values, scores, pattern and result.

Attention modules of transformers hand queries, keys and values over to one attention function, and
get the weighted values back; whoever listens there sees them pass. Scores and patterns are formed
only for the sequences that somebody looks at, in the layers where he does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, get_args

import torch

from ndif_client.wire.graph import AttentionPort

#: In the order in which they pass.
PORTS: tuple[AttentionPort, ...] = get_args(AttentionPort)

#: Those that have a value for each pair of positions.
SQUARE = frozenset(("scores", "pattern"))


class Squares:
    """What belongs to pairs of positions: a `[heads, length, keys]` tensor a block of rows.

    There are as many keys as rows, and more where the rows continue what lies in the KV cache.

    Args:
        blocks: by the first row of each.
    """

    def __init__(self, blocks: Mapping[int, torch.Tensor]) -> None:
        self.blocks = dict(blocks)

    def clone(self) -> Squares:
        """Return a copy that can be written without changing this one."""
        return Squares({start: block.clone() for start, block in self.blocks.items()})

    def map(self, function: Callable[[int, torch.Tensor], torch.Tensor]) -> Squares:
        """Return what a function makes of each block."""
        return Squares({start: function(start, block) for start, block in self.blocks.items()})


def stack_squares(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return `[batch, heads, longest, keys]`, smaller blocks padded on the left with zeros."""
    queries, keys = (max(block.shape[axis] for block in blocks) for axis in (-2, -1))
    padded = [
        torch.nn.functional.pad(block, (keys - block.shape[-1], 0, queries - block.shape[-2], 0))
        for block in blocks
    ]
    return torch.stack(padded)


def fill_squares(blocks: Sequence[torch.Tensor], value: torch.Tensor) -> None:
    """Write `[batch, heads, longest, keys]` into blocks in place; padding is dropped."""
    for block, own in zip(blocks, value, strict=True):
        block.copy_(own[..., own.shape[-2] - block.shape[-2] :, own.shape[-1] - block.shape[-1] :])


class Listener(Protocol):
    """Sees, and may replace, what passes inside of attentions."""

    def wants(self, module: torch.nn.Module, port: AttentionPort) -> bool:
        """Whether it looks at anything there."""
        ...

    def explicit(self, module: torch.nn.Module) -> Sequence[tuple[int, int]]:
        """Return first row and length of the sequences whose scores or patterns it looks at."""
        ...

    def fire(self, module: torch.nn.Module, port: AttentionPort, value: Any) -> Any:
        """Look at a tensor `[batch, heads, length, ...]` or `Squares`; return what is to follow."""
        ...


_listener: ContextVar[Listener | None] = ContextVar("attention_listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block, a listener is told what passes inside of attentions."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def current_listener() -> Listener | None:
    """Return who listens now."""
    return _listener.get()


def heard(
    listener: Listener | None, module: torch.nn.Module, port: AttentionPort, value: Any
) -> Any:
    """Return a value after the listener, if he wants it, has seen it."""
    if listener is None or not listener.wants(module, port):
        return value
    return listener.fire(module, port, value)


def attention_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Return scores as they enter the softmax, as transformers' eager attention forms them.

    Args:
        query: `[..., heads, length, dim]`; `key` may have fewer heads (GQA).
        mask: True where a query may see a key; None if it may see all. Elsewhere the score is the
            dtype's lowest number.
        scale: None for 1 / sqrt(dim).
        softcap: scores pass through `softcap * tanh(scores / softcap)` (Gemma 2).
    """
    key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores


def attention_pattern(scores: torch.Tensor) -> torch.Tensor:
    """Return the probabilities of scores, computed in float32 at least."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide).to(scores.dtype)


def weighted_values(pattern: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return `[..., heads, length, dim]`; `value` may have fewer heads (GQA)."""
    return pattern @ value.repeat_interleave(pattern.shape[-3] // value.shape[-3], -3)
