"""Operations of the catalogue for which torch has no one callable that fits.

They do on every device, and on meta tensors, what a graph may ask of them. None changes its
arguments, and no shape of a result depends on values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ndif_actor.engine.low_rank import low_rank


def subscripts(index: Any) -> tuple[Any, ...]:
    """Return an index as a tuple of subscripts; a list of numbers in it becomes an index tensor."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(part) if isinstance(part, tuple) else part for part in parts)


def _getitem(input: Any, index: Any) -> Any:
    if isinstance(input, tuple):
        if not isinstance(index, int | slice):
            raise TypeError("a tuple of tensors is indexed by one number or slice")
        return input[index]
    return input[_placed(subscripts(index), input)]


def _placed(parts: tuple[Any, ...], input: torch.Tensor) -> tuple[Any, ...]:
    """Let a single number stand where torch would look at the value of one on the meta device."""
    if not input.is_meta:
        return parts
    return tuple(0 if isinstance(part, torch.Tensor) and not part.dim() else part for part in parts)


def _setitem(input: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    if is_mask(index):
        return _masked(input, index, value)
    changed = input.clone()
    changed[_placed(subscripts(index), input)] = value
    return changed


def is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


def _masked(input: torch.Tensor, mask: torch.Tensor, value: Any) -> torch.Tensor:
    """Return `input` with `value` wherever the mask over its first dimensions is true."""
    if mask.shape != input.shape[: mask.dim()]:
        raise IndexError(f"a mask of shape {list(mask.shape)} for a value of {list(input.shape)}")
    rest = input.dim() - mask.dim()
    if not isinstance(value, torch.Tensor):
        return input.masked_fill(mask.reshape(*mask.shape, *[1] * rest), value)
    if value.dim() > rest:
        raise IndexError(
            "what is written where a mask is true has the same value there, as how often it is "
            "true depends on values; use where(mask, a, b)"
        )
    return torch.where(mask.reshape(*mask.shape, *[1] * rest), value.to(input.dtype), input)


def _type_as(input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return input.to(other.dtype)


def _reshape_as(input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return input.reshape(other.shape)


def _unfold(input: torch.Tensor, dimension: int, size: int, step: int) -> torch.Tensor:
    return input.unfold(dimension, size, step)


def _to(input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return input.to(dtype)


def _view(input: torch.Tensor, shape: Any) -> torch.Tensor:
    return input.reshape(shape)


def _expand(input: torch.Tensor, shape: Any) -> torch.Tensor:
    return input.expand(shape)


def _repeat(input: torch.Tensor, repeats: Any) -> torch.Tensor:
    return input.repeat(repeats)


def _div(input: torch.Tensor, other: Any, rounding_mode: str | None = None) -> torch.Tensor:
    if rounding_mode == "trunc" and not torch.result_type(input, other).is_floating_point:
        # The smallest integer divided by -1 overflows, which ends the process.
        minus_one = torch.as_tensor(other) == -1
        divisor = torch.where(minus_one, 1, other)
        return torch.where(minus_one, -input, torch.div(input, divisor, rounding_mode="trunc"))
    return torch.div(input, other, rounding_mode=rounding_mode)


def _sort(
    input: torch.Tensor, dim: int = -1, descending: bool = False, stable: bool = False
) -> Any:
    return torch.sort(input, dim=dim, descending=descending, stable=stable)


def _argsort(
    input: torch.Tensor, dim: int = -1, descending: bool = False, stable: bool = False
) -> torch.Tensor:
    return torch.argsort(input, dim=dim, descending=descending, stable=stable)


def _einsum(equation: str, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.einsum(equation, *operands)


def _expand_as(input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return input.expand(other.shape)


def _new_zeros(input: torch.Tensor, size: Any, *, dtype: Any = None) -> torch.Tensor:
    return input.new_zeros(size, dtype=dtype or input.dtype)


def _new_ones(input: torch.Tensor, size: Any, *, dtype: Any = None) -> torch.Tensor:
    return input.new_ones(size, dtype=dtype or input.dtype)


def _new_full(
    input: torch.Tensor, size: Any, fill_value: float, *, dtype: Any = None
) -> torch.Tensor:
    return input.new_full(size, fill_value, dtype=dtype or input.dtype)


def _equal(input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if input.shape != other.shape:
        return torch.zeros((), dtype=torch.bool, device=input.device)
    return (input == other).all()


def _allclose(
    input: torch.Tensor,
    other: torch.Tensor,
    rtol: float = 1e-5,
    atol: float = 1e-8,
    equal_nan: bool = False,
) -> torch.Tensor:
    return torch.isclose(input, other, rtol=rtol, atol=atol, equal_nan=equal_nan).all()


def _histc(input: torch.Tensor, bins: int, min: float, max: float) -> torch.Tensor:
    if min >= max:
        raise ValueError("histc needs min and max, max the larger one")
    if input.is_meta:
        return input.new_empty(bins)
    return torch.histc(input, bins, min, max)


def bins(minlength: Any) -> int:
    """Return the length of a bincount.

    Raises:
        ValueError: it is not given.
    """
    if not isinstance(minlength, int) or minlength < 1:
        raise ValueError("bincount needs minlength, a number above all that is counted")
    return minlength


def _bincount(
    input: torch.Tensor, weights: torch.Tensor | None = None, minlength: int = 0
) -> torch.Tensor:
    ones = torch.ones_like(input, dtype=torch.int64) if weights is None else weights
    if input.dim() != 1 or input.is_floating_point():
        raise ValueError("bincount counts the numbers in one list of integers")
    return ones.new_zeros(bins(minlength)).scatter_add(0, input.long(), ones)


def _cov(input: torch.Tensor, *, correction: int = 1) -> torch.Tensor:
    return _of_rows(input) if input.is_meta else torch.cov(input, correction=correction)


def _corrcoef(input: torch.Tensor) -> torch.Tensor:
    return _of_rows(input) if input.is_meta else torch.corrcoef(input)


def _of_rows(input: torch.Tensor) -> torch.Tensor:
    if input.dim() > 2:
        raise ValueError("a matrix is needed, whose rows are the variables")
    rows = input.shape[:1] if input.dim() == 2 else ()
    return input.new_empty((*rows, *rows))


def _tensor_split(
    input: torch.Tensor, indices_or_sections: Any, dim: int = 0
) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor_split(input, indices_or_sections, dim))


def _lstsq(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if A.is_meta:
        columns = B.shape[A.dim() - 1 :]
        if A.dim() < 2 or A.shape[:-1] != B.shape[: A.dim() - 1] or len(columns) > 1:
            raise ValueError("lstsq takes [..., m, n], and [..., m] or [..., m, k]")
        return (A.new_empty((*A.shape[:-2], A.shape[-1], *columns)),)
    # The one driver that there is on every device.
    return (torch.linalg.lstsq(A, B, driver="gels").solution,)


def _block_diag(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.block_diag(*tensors)


def _meshgrid(tensors: Sequence[torch.Tensor], indexing: str = "ij") -> tuple[torch.Tensor, ...]:
    return tuple(torch.meshgrid(*tensors, indexing=indexing))


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    if dropout_p:
        raise ValueError("scaled_dot_product_attention: dropout_p is not offered")
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale
    )


CALLABLES: dict[str, Callable[..., Any]] = {
    "getitem": _getitem,
    "setitem": _setitem,
    "to": _to,
    "view": _view,
    "expand": _expand,
    "repeat": _repeat,
    "div": _div,
    "sort": _sort,
    "argsort": _argsort,
    "einsum": _einsum,
    "allclose": _allclose,
    "bincount": _bincount,
    "block_diag": _block_diag,
    "corrcoef": _corrcoef,
    "cov": _cov,
    "entr": torch.special.entr,
    "equal": _equal,
    "expand_as": _expand_as,
    "histc": _histc,
    "lstsq": _lstsq,
    "meshgrid": _meshgrid,
    "new_full": _new_full,
    "new_ones": _new_ones,
    "new_zeros": _new_zeros,
    "scaled_dot_product_attention": _attention,
    "tensor_split": _tensor_split,
    "low_rank": low_rank,
    "reshape_as": _reshape_as,
    "type_as": _type_as,
    "unfold": _unfold,
}
