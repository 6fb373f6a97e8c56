"""Random numbers of a request: drawn on the CPU from a generator of its own.

All shards draw the same, whatever their devices are, and a request draws what plain torch draws on
the CPU after `torch.manual_seed(seed)`. On the meta device only shapes are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def _rand(
    generator: torch.Generator, device: torch.device, size: Sequence[int], *, dtype: Any = None
) -> torch.Tensor:
    return _drawn(torch.rand, generator, device, size, dtype=dtype)


def _randn(
    generator: torch.Generator, device: torch.device, size: Sequence[int], *, dtype: Any = None
) -> torch.Tensor:
    return _drawn(torch.randn, generator, device, size, dtype=dtype)


def _rand_like(
    generator: torch.Generator, device: torch.device, input: torch.Tensor, *, dtype: Any = None
) -> torch.Tensor:
    return _drawn(torch.rand, generator, device, input.shape, dtype=dtype or input.dtype)


def _randn_like(
    generator: torch.Generator, device: torch.device, input: torch.Tensor, *, dtype: Any = None
) -> torch.Tensor:
    return _drawn(torch.randn, generator, device, input.shape, dtype=dtype or input.dtype)


def _randint(
    generator: torch.Generator,
    device: torch.device,
    low: int,
    high: int,
    size: Sequence[int],
    *,
    dtype: Any = None,
) -> torch.Tensor:
    return _drawn(torch.randint, generator, device, low, high, size, dtype=dtype)


def _randperm(
    generator: torch.Generator, device: torch.device, n: int, *, dtype: Any = None
) -> torch.Tensor:
    return _drawn(torch.randperm, generator, device, n, dtype=dtype or torch.int64)


def _bernoulli(
    generator: torch.Generator, device: torch.device, input: torch.Tensor
) -> torch.Tensor:
    if input.is_meta:
        return torch.empty_like(input)
    return torch.bernoulli(input.detach().cpu(), generator=generator).to(device)


def _dropout(
    generator: torch.Generator,
    device: torch.device,
    input: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
) -> torch.Tensor:
    if not training:
        return input
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p is a probability, not {p}")
    if input.is_meta or p == 1:
        return input * 0
    kept = torch.empty(input.shape, dtype=input.dtype).bernoulli_(1 - p, generator=generator)
    return input * kept.div_(1 - p).to(device)


def _multinomial(
    generator: torch.Generator,
    device: torch.device,
    input: torch.Tensor,
    num_samples: int,
    replacement: bool = False,
) -> torch.Tensor:
    if input.is_meta:
        return torch.multinomial(input, num_samples, replacement)
    weights = input.detach().cpu()
    return torch.multinomial(weights, num_samples, replacement, generator=generator).to(device)


def _drawn(
    draw: Callable[..., torch.Tensor],
    generator: torch.Generator,
    device: torch.device,
    *args: Any,
    dtype: Any = None,
) -> torch.Tensor:
    if device.type == "meta":
        return draw(*args, dtype=dtype, device=device)
    return draw(*args, dtype=dtype, generator=generator).to(device)


#: Each takes the generator and the device of its result before its own arguments.
CALLABLES: dict[str, Callable[..., torch.Tensor]] = {
    "rand": _rand,
    "rand_like": _rand_like,
    "randn": _randn,
    "randn_like": _randn_like,
    "randint": _randint,
    "randperm": _randperm,
    "bernoulli": _bernoulli,
    "dropout": _dropout,
    "multinomial": _multinomial,
}
