"""Linear layers in half precision on processors that have no instructions for it.

There, torch's own bfloat16 product is several times slower than a float32 one. Computing in
float32 and rounding once, as a bfloat16 unit would, gives the same numbers to within the order of
summation; `bench/micro/half_linear.py` has the figures. A few rows are left to torch: its product
of a vector reads the weight once, and widening it would cost more than it saves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

_HALF = (torch.bfloat16, torch.float16)

#: Elements of a weight widened at a time: 4 MiB, which a core's cache holds until they are used.
#: Widened whole, a large weight goes through fresh memory, several times slower at few rows.
_WIDENED_AT_ONCE = 1 << 20

#: Rows up to which torch's own product is faster.
_FEW_ROWS = 3


def widen_linears(model: torch.nn.Module) -> int:
    """Let every half-precision Linear of `model` compute in float32; return how many there are."""
    widened = 0
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.dtype in _HALF:
            module.forward = _Widened(module)  # type: ignore[method-assign]
            widened += 1
    return widened


class _Widened:
    """The forward of one Linear, in float32 from rounded inputs to a result rounded once."""

    def __init__(self, module: torch.nn.Linear) -> None:
        self._module = module

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self._module.weight, self._module.bias
        if input.numel() <= _FEW_ROWS * input.shape[-1]:
            return linear(input, weight, bias)
        if torch.is_grad_enabled() and input.requires_grad:
            made: torch.Tensor = _Differentiable.apply(input, weight, bias)
            return made
        return _widened(input, weight, bias)


class _Differentiable(torch.autograd.Function):
    """The same, for autograd, which would keep every widened weight until the backward."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.weight = weight
        return _widened(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        wide = gradient.float()
        rows = max(1, _WIDENED_AT_ONCE // ctx.weight.shape[1])
        total = wide.new_zeros(*wide.shape[:-1], ctx.weight.shape[1])
        for start in range(0, ctx.weight.shape[0], rows):
            part = slice(start, start + rows)
            total += wide[..., part] @ ctx.weight[part].float()
        return total.to(gradient.dtype), None, None


def _widened(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = max(1, _WIDENED_AT_ONCE // weight.shape[1])
    wide = input.float()
    if weight.shape[0] <= rows:
        return _product(wide, weight, bias).to(input.dtype)
    result = input.new_empty(*input.shape[:-1], weight.shape[0])
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        result[..., part] = _product(wide, weight[part], None if bias is None else bias[part])
    return result


def _product(wide: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return linear(wide, weight.float(), None if bias is None else bias.float())
