"""Attention over a packed row: each sequence attends to itself, as transformers' own would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from ndif_actor.engine.attention import AttentionLayout, Segments, attending, ragged_attention

HEADS, DIM = 4, 6

#: Three sequences of 1 token, two of 4, one of 7.
SEGMENTS = [Segments(0, 3, 1), Segments(3, 2, 4), Segments(11, 1, 7)]
TOTAL = 18


class Attention(torch.nn.Module):
    """What attention functions look at in a module."""

    def __init__(self, key_value_heads: int, *, causal: bool = True) -> None:
        super().__init__()
        self.num_key_value_groups = HEADS // key_value_heads
        self.is_causal = causal
        self.eval()


def row(key_value_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, TOTAL, DIM, generator=generator) * 2
        for heads in (HEADS, key_value_heads, key_value_heads)
    ]


def sequences() -> list[slice]:
    return [
        slice(segment.start + n * segment.length, segment.start + (n + 1) * segment.length)
        for segment in SEGMENTS
        for n in range(segment.count)
    ]


def alone(module: Attention, tensors: list[torch.Tensor], **options: Any) -> torch.Tensor:
    """Return the attention of each sequence alone, by the plain formula of transformers."""
    parts = []
    for where in sequences():
        query, key, value = (tensor[:, :, where] for tensor in tensors)
        distance = torch.arange(query.shape[2])[:, None] - torch.arange(query.shape[2])
        window = options.get("sliding_window") or TOTAL
        seen = distance.abs() < window
        if module.is_causal:
            seen &= distance >= 0
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        output, _ = eager_attention_forward(
            module, query, key, value, mask[None, None], scaling=0.3, softcap=options.get("softcap")
        )
        parts.append(output)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 3}, {"softcap": 2.0}, {"softcap": 2.0, "sliding_window": 3}],
    ids=str,
)
def test_each_sequence_of_a_row_attends_as_it_does_alone(
    key_value_heads: int, causal: bool, options: dict[str, Any]
) -> None:
    module = Attention(key_value_heads, causal=causal)
    tensors = row(key_value_heads)

    with attending(AttentionLayout(SEGMENTS)):
        output, weights = ragged_attention(module, *tensors, None, scaling=0.3, **options)

    assert weights is None
    assert output.shape == (1, TOTAL, HEADS, DIM)
    torch.testing.assert_close(output, alone(module, tensors, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_no_sequence_sees_a_bit_of_another(options: dict[str, Any], poison: float) -> None:
    module = Attention(2)
    with attending(AttentionLayout(SEGMENTS)):
        clean, _ = ragged_attention(module, *row(2), None, scaling=0.3, **options)
    for where in sequences():
        tensors = row(2)
        for tensor in tensors:
            tensor[:, :, where] = poison

        with attending(AttentionLayout(SEGMENTS)):
            output, _ = ragged_attention(module, *tensors, None, scaling=0.3, **options)

        others = torch.ones(TOTAL, dtype=torch.bool)
        others[where] = False
        assert torch.equal(output[:, others], clean[:, others])


def test_outside_of_a_packed_pass_it_attends_as_transformers_does() -> None:
    module = Attention(2)
    query, key, value = (tensor[:, :, 11:] for tensor in row(2))

    output, _ = ragged_attention(module, query, key, value, None, scaling=0.3)
    with attending(None):
        capped, _ = ragged_attention(module, query, key, value, None, scaling=0.3, softcap=2.0)

    wanted = alone(module, row(2))[:, 11:]
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    wanted = alone(module, row(2), softcap=2.0)[:, 11:]
    torch.testing.assert_close(capped, wanted, rtol=1e-5, atol=1e-5)


def test_the_modules_that_attend_are_noted_in_order() -> None:
    first, second = Attention(4), Attention(4)

    with attending(AttentionLayout(SEGMENTS)) as record:
        for module in (first, second, first):
            ragged_attention(module, *row(4), None, scaling=0.3)

    assert [one.module for one in record.attended] == [first, second, first]
