"""Attention over a ragged batch: the one operation that must know where a sequence ends.

Registered with transformers under `IMPLEMENTATION`; every other module of the model runs on the
packed row `[1, T, ...]` unchanged. While a pass is packed, each sequence attends to its own rows
and its own pages of the KV cache alone, so no value of a neighbour is ever read. Otherwise
transformers' own implementation runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from ndif_actor.engine.internals import (
    SQUARE,
    Listener,
    Squares,
    attention_pattern,
    attention_scores,
    current_listener,
    heard,
    weighted_values,
)

if TYPE_CHECKING:
    from ndif_actor.engine.cache import KVCache

#: Name under which transformers finds this attention.
IMPLEMENTATION = "ndif_ragged"


class Segments(msgspec.Struct, frozen=True):
    """`count` sequences of `length` tokens each, end to end from token `start` of the row.

    They begin in this pass, so each attends to its own rows.
    """

    start: int
    count: int
    length: int


class Chunk(msgspec.Struct, frozen=True):
    """The next `length` tokens of one sequence, from token `start` of the row.

    `slots` are the places in the KV cache of all its tokens so far, these included.
    """

    start: int
    length: int
    slots: torch.Tensor


class Decodes:
    """One token each of several sequences, end to end from token `start` of the row.

    Args:
        start: their first row.
        slots: `[sequences, longest]`, the places in the KV cache of all tokens of each sequence,
            this one included; what follows the last one may be any place without NaN or inf.
        lengths: for each sequence, how many of its slots count.
    """

    def __init__(self, start: int, slots: torch.Tensor, lengths: Sequence[int]) -> None:
        self.start = start
        self.slots = slots
        self.lengths = lengths
        self._masks: dict[int | None, torch.Tensor | None] = {}

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Return `[sequences, 1, 1, longest]`, True where a key may be seen; None if all may."""
        if window not in self._masks:
            # On the host, where looking at it makes nobody wait for the device.
            places = torch.arange(self.slots.shape[1])
            ends = torch.tensor(self.lengths)[:, None]
            seen = places < ends
            if window is not None:
                seen &= places >= ends - window
            mask = None if bool(seen.all()) else seen[:, None, None].to(self.slots.device)
            self._masks[window] = mask
        return self._masks[window]


class KeptRows(msgspec.Struct, frozen=True):
    """Rows whose keys and values go into the KV cache, and their places there."""

    rows: torch.Tensor
    slots: torch.Tensor


class AttentionLayout(msgspec.Struct, frozen=True):
    """Where the sequences of a packed row begin and end, and which of them have a past."""

    fresh: Sequence[Segments]
    chunks: Sequence[Chunk] = ()
    decodes: Sequence[Decodes] = ()
    kept: KeptRows | None = None

    def slots(self, row: int) -> torch.Tensor | None:
        """Return the slots of all tokens of the sequence at `row`, if it has a past."""
        for chunk in self.chunks:
            if chunk.start == row:
                return chunk.slots
        for decodes in self.decodes:
            if 0 <= (place := row - decodes.start) < len(decodes.lengths):
                return decodes.slots[place, : decodes.lengths[place]]
        return None


class Attended(msgspec.Struct, frozen=True):
    """A module that attended, and the shape of one token's keys and values: `[heads, dim]`."""

    module: torch.nn.Module
    key_shape: tuple[int, int]
    value_shape: tuple[int, int]


class AttentionRecord(msgspec.Struct):
    """The running pass: how its row lies now, the KV cache, and which modules have attended.

    `layout` is None while the pass is an ordinary padded batch.
    """

    layout: AttentionLayout | None
    cache: KVCache | None = None
    attended: list[Attended] = msgspec.field(default_factory=list)


_current: ContextVar[AttentionRecord | None] = ContextVar("ragged_attention", default=None)


@contextmanager
def attending(
    layout: AttentionLayout | None, cache: KVCache | None = None
) -> Iterator[AttentionRecord]:
    """Within the block, attention keeps to the sequences of the record's layout.

    Args:
        layout: what to begin with; None means an ordinary padded batch.
        cache: where sequences with a past have their keys and values.
    """
    record = AttentionRecord(layout, cache)
    token = _current.set(record)
    try:
        yield record
    finally:
        _current.reset(token)
        _window_mask.cache_clear()  # one pass needs the same few in every layer, the next others


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend within each sequence of the packed row.

    Args:
        module: the attention module; its `is_causal` is respected.
        query: `[1, heads, T, head_dim]`; `key` and `value` may have fewer heads (GQA).
        attention_mask: None while packed; a mask of transformers' otherwise.
        options: what transformers passes: scaling, sliding_window, softcap, ...

    Returns:
        `[1, T, heads, head_dim]`, and None for the attention weights, which are never formed.
    """
    record, listener = _current.get(), current_listener()
    query = heard(listener, module, "query", query)
    key = heard(listener, module, "key", key)
    value = heard(listener, module, "value", value)
    if record is not None:
        shapes = ((t.shape[1], t.shape[3]) for t in (key, value))
        record.attended.append(Attended(module, *shapes))
    if record is None or record.layout is None:
        out = _padded(module, query, key, value, attention_mask, listener, **options)
        return _told(listener, module, out), None
    packed = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    _attend_fresh(module, record.layout, query, key, value, packed, **options)
    if record.cache is not None:
        if (kept := record.layout.kept) is not None:
            record.cache.write(module, key, value, kept.rows, kept.slots)
        _attend_cached(module, record.layout, record.cache, query, packed, **options)
    if listener is not None and (blocks := listener.explicit(module)):
        _attend_explicitly(module, record, blocks, listener, query, key, value, packed, **options)
    return _told(listener, module, packed), None


def _told(listener: Listener | None, module: torch.nn.Module, out: torch.Tensor) -> torch.Tensor:
    """Return `[batch, length, heads, dim]` after the listener has seen it, heads before lengths."""
    if listener is None or not listener.wants(module, "result"):
        return out
    told: torch.Tensor = listener.fire(module, "result", out.transpose(1, 2))
    return told.transpose(1, 2).contiguous()


def _attend_explicitly(
    module: torch.nn.Module,
    record: AttentionRecord,
    blocks: Sequence[tuple[int, int]],
    listener: Listener,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: torch.Tensor,
    **options: Any,
) -> None:
    """Let sequences attend again, with scores and patterns that are seen."""
    causal, window = _is_causal(module, options), options.get("sliding_window")
    scores, values = {}, {}
    for start, length in blocks:
        rows, mask = slice(start, start + length), None
        slots = record.layout.slots(start) if record.layout is not None else None
        if slots is not None and record.cache is not None:
            (own,), (values[start],) = record.cache.read(module, slots[None])
            mask = _chunk_mask(length, slots.numel(), window, query.device)[0, 0]
        else:
            own, values[start] = key[0, :, rows], value[0, :, rows]
            if causal or window is not None:
                mask = _window_mask(length, window or length, causal, query.device)
        scores[start] = attention_scores(
            query[0, :, rows], own, mask, options.get("scaling"), options.get("softcap")
        )
    seen = heard(listener, module, "scores", Squares(scores))
    pattern = seen.map(lambda _, block: attention_pattern(block))
    pattern = heard(listener, module, "pattern", pattern)
    for start, block in pattern.blocks.items():
        mixed = weighted_values(block, values[start])
        packed[0, start : start + block.shape[-2]] = mixed.transpose(0, 1)


def _is_causal(module: torch.nn.Module, options: dict[str, Any]) -> bool:
    causal = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _attend_fresh(
    module: torch.nn.Module,
    layout: AttentionLayout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: torch.Tensor,
    **options: Any,
) -> None:
    """Let sequences without a past attend to themselves; `packed` is `[1, T, heads, dim]`."""
    causal = _is_causal(module, options)
    for segment in layout.fresh:
        stop = segment.start + segment.count * segment.length
        attended = _attend(
            *(_segment(t, segment, stop) for t in (query, key, value)),
            causal=causal,
            scale=options.get("scaling"),
            window=options.get("sliding_window"),
            softcap=options.get("softcap"),
        )
        rows = packed[0, segment.start : stop].unflatten(0, (segment.count, segment.length))
        rows.copy_(attended.transpose(1, 2))


def _attend_cached(
    module: torch.nn.Module,
    layout: AttentionLayout,
    cache: KVCache,
    query: torch.Tensor,
    packed: torch.Tensor,
    **options: Any,
) -> None:
    """Let sequences with a past attend to their pages of the cache."""
    scale, softcap = options.get("scaling"), options.get("softcap")
    window = options.get("sliding_window")
    for chunk in layout.chunks:
        stop = chunk.start + chunk.length
        _attend_past(
            query[:, :, chunk.start : stop],
            *cache.read(module, chunk.slots[None]),
            _chunk_mask(chunk.length, chunk.slots.numel(), window, query.device),
            scale,
            softcap,
            packed[:, chunk.start : stop],
        )
    for decodes in layout.decodes:
        stop = decodes.start + decodes.slots.shape[0]
        _attend_past(
            query[0, :, decodes.start : stop].transpose(0, 1).unsqueeze(2),
            *cache.read(module, decodes.slots),
            decodes.mask(window),
            scale,
            softcap,
            packed[0, decodes.start : stop].unsqueeze(1),
        )


def _attend_past(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
    out: torch.Tensor,
) -> None:
    """Attend to keys of the cache; `out` is `[batch, length, heads, dim]`.

    The query heads that share a key head are attended to as if they were further positions,
    which spares a copy of the keys for each of them, and on a CPU half of the time.
    """
    if softcap is not None:
        out.copy_(_softcapped(query, key, value, mask, scale, softcap).transpose(1, 2))
        return
    batch, heads, length, dim = query.shape
    shared = heads // key.shape[1]
    queries = query.reshape(batch, key.shape[1], shared * length, dim)
    if mask is not None and length > 1:
        mask = mask.repeat(1, 1, shared, 1)
    attended = scaled_dot_product_attention(queries, key, value, attn_mask=mask, scale=scale)
    out.copy_(attended.reshape(batch, heads, length, -1).transpose(1, 2))


def _padded(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    listener: Listener | None,
    **options: Any,
) -> torch.Tensor:
    """Attend in an ordinary `[batch, heads, length, dim]` batch, as transformers would."""
    softcap = options.get("softcap")
    seen = listener is not None and any(listener.wants(module, port) for port in SQUARE)  # type: ignore[arg-type]
    if softcap is None and not seen:
        attended, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        return attended
    length = query.shape[2]
    if mask is None and _is_causal(module, options):
        mask = _window_mask(length, length, True, query.device)
    scores = attention_scores(query, key, mask, options.get("scaling"), softcap)
    scores = heard(listener, module, "scores", scores)
    pattern = heard(listener, module, "pattern", attention_pattern(scores))
    return weighted_values(pattern, value).transpose(1, 2).contiguous()


def _segment(packed: torch.Tensor, segment: Segments, stop: int) -> torch.Tensor:
    """View `[1, heads, T, dim]` as `[count, heads, length, dim]` for one segment."""
    rows = packed[0, :, segment.start : stop]
    return rows.unflatten(1, (segment.count, segment.length)).transpose(0, 1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    length = query.shape[2]
    mask = None
    if window is not None and length > window:
        mask = _window_mask(length, window, causal, query.device)
    if softcap is not None:
        if mask is None and causal:
            mask = _window_mask(length, length, True, query.device)
        return _softcapped(query, key, value, mask, scale, softcap)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal and mask is None and length > 1,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention whose scores are capped, for which there is no fused kernel on every device."""
    pattern = attention_pattern(attention_scores(query, key, mask, scale, softcap))
    return weighted_values(pattern, value)


@cache
def _window_mask(length: int, window: int, causal: bool, device: torch.device) -> torch.Tensor:
    """True where query i may see key j: the last `window` positions, its own included."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    if causal:
        return (distance >= 0) & (distance < window)
    return distance.abs() < window


def _chunk_mask(length: int, total: int, window: int | None, device: torch.device) -> torch.Tensor:
    """`[1, 1, length, total]`: True where each of the last `length` positions may see a key."""
    mine = torch.arange(total - length, total, device=device)[:, None]
    keys = torch.arange(total, device=device)
    seen = keys <= mine
    if window is not None:
        seen &= keys > mine - window
    return seen[None, None]


def _ragged_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    record = _current.get()
    packed = record is not None and record.layout is not None
    # On the meta device a mask has no values to look at, and none of the shapes depends on it.
    if packed or torch.device(kwargs.get("device", "cpu")).type == "meta":
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def _eager_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    # Whether a mask that hides nothing can be left out can't be seen without values.
    if torch.device(kwargs.get("device", "cpu")).type == "meta":
        kwargs["allow_is_bidirectional_skip"] = False
    mask: torch.Tensor | None = eager_mask(*args, **kwargs)
    return mask


AttentionInterface.register(IMPLEMENTATION, ragged_attention)
AttentionMaskInterface.register("eager", _eager_mask)
AttentionMaskInterface.register(IMPLEMENTATION, _ragged_mask)
