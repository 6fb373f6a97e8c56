"""Attention over a ragged batch: the one operation that must know where a sequence ends.

Registered with transformers under `IMPLEMENTATION`; every other module of the model runs on the
packed row `[1, T, ...]` unchanged. While a pass is packed, each segment attends to itself alone,
so no value of a neighbour is ever read. Otherwise transformers' own implementation runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import msgspec
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

#: Name under which transformers finds this attention.
IMPLEMENTATION = "ndif_ragged"


class Segments(msgspec.Struct, frozen=True):
    """`count` sequences of `length` tokens each, end to end from token `start` of the row."""

    start: int
    count: int
    length: int


class AttentionRecord(msgspec.Struct):
    """The segments of the running pass, and which modules attended in it."""

    segments: Sequence[Segments] | None
    modules: list[torch.nn.Module] = msgspec.field(default_factory=list)


_current: ContextVar[AttentionRecord | None] = ContextVar("ragged_attention", default=None)


@contextmanager
def attending(segments: Sequence[Segments] | None) -> Iterator[AttentionRecord]:
    """Within the block, attention keeps to `segments`; None means an ordinary padded batch."""
    record = AttentionRecord(segments)
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
    """Attend within each segment of the packed row.

    Args:
        module: the attention module; its `is_causal` is respected.
        query: `[1, heads, T, head_dim]`; `key` and `value` may have fewer heads (GQA).
        attention_mask: None while packed; a mask of transformers' otherwise.
        options: what transformers passes: scaling, sliding_window, softcap, ...

    Returns:
        `[1, T, heads, head_dim]`, and None for the attention weights, which are never formed.
    """
    record = _current.get()
    if record is not None:
        record.modules.append(module)
    if record is None or record.segments is None:
        return _padded(module, query, key, value, attention_mask, **options)
    heads, total = query.shape[1], query.shape[2]
    packed = query.new_empty(1, total, heads, value.shape[-1])
    causal = options.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    for segment in record.segments:
        stop = segment.start + segment.count * segment.length
        attended_rows = _attend(
            *(_segment(t, segment, stop) for t in (query, key, value)),
            causal=causal,
            scale=options.get("scaling"),
            window=options.get("sliding_window"),
            softcap=options.get("softcap"),
        )
        rows = packed[0, segment.start : stop].view(segment.count, segment.length, heads, -1)
        rows.copy_(attended_rows.transpose(1, 2))
    return packed, None


def _padded(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend in an ordinary `[batch, heads, length, dim]` batch, as transformers would."""
    if (softcap := options.get("softcap")) is None:
        attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, **options
        )
        return attended
    if mask is None:
        mask = _window_mask(query.shape[2], query.shape[2], True, query.device)
    out = _softcapped(query, key, value, mask, options.get("scaling"), softcap)
    return out.transpose(1, 2).contiguous(), None


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
    softcap: float,
) -> torch.Tensor:
    """Attention whose scores pass through `softcap * tanh(scores / softcap)` (Gemma 2)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return weights @ value


@cache
def _window_mask(length: int, window: int, causal: bool, device: torch.device) -> torch.Tensor:
    """True where query i may see key j: the last `window` positions, its own included."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    if causal:
        return (distance >= 0) & (distance < window)
    return distance.abs() < window


def _ragged_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    record = _current.get()
    packed = record is not None and record.segments is not None
    # On the meta device a mask has no values to look at, and none of the shapes depends on it.
    if packed or torch.device(kwargs.get("device", "cpu")).type == "meta":
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(IMPLEMENTATION, ragged_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _ragged_mask)
