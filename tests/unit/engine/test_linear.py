"""Linear layers that compute half precision in single precision."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from ndif_actor.engine.linear import widen_linears


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_widened_linear_gives_what_torch_gives_but_for_rounding(
    dtype: torch.dtype, bias: bool
) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32, bias=bias, dtype=dtype)
    values = torch.randn(2, 5, 64, dtype=dtype)
    narrow = linear(values)
    exact = deepcopy(linear).double()(values.double())

    assert widen_linears(linear) == 1
    wide = linear(values)

    assert wide.dtype == dtype
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(wide, narrow, rtol=2 * epsilon, atol=2 * epsilon)
    # It is rounded once, so it is the nearest number there is.
    torch.testing.assert_close(wide.double(), exact, rtol=epsilon / 2 * 1.01, atol=1e-4)


def test_a_large_linear_is_widened_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 23, dtype=torch.bfloat16)
    values = torch.randn(2, 5, 16, dtype=torch.bfloat16)
    widen_linears(linear)
    whole = linear(values)

    monkeypatch.setattr("ndif_actor.engine.linear._WIDENED_AT_ONCE", 16 * 5)

    torch.testing.assert_close(linear(values), whole, rtol=0.01, atol=0.01)


def test_only_linears_in_half_precision_are_widened() -> None:
    class Own(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(
        torch.nn.Linear(2, 2),
        torch.nn.Linear(2, 2, dtype=torch.bfloat16),
        Own(2, 2, dtype=torch.bfloat16),
        torch.nn.Embedding(2, 2, dtype=torch.bfloat16),
    )

    assert widen_linears(model) == 1


def test_a_widened_linear_still_wakes_its_hooks() -> None:
    linear = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    widen_linears(linear)
    seen = []
    linear.register_forward_hook(lambda module, args, output: seen.append(output))

    output = linear(torch.ones(1, 4, dtype=torch.bfloat16))

    assert seen == [output]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_widened_linear_has_torchs_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32, dtype=dtype).requires_grad_(False)
    values = torch.randn(2, 5, 64, dtype=dtype)
    exact = values.double().requires_grad_()
    deepcopy(linear).double()(exact).sin().sum().backward()
    widen_linears(linear)

    own = values.clone().requires_grad_()
    linear(own).sin().sum().backward()

    assert own.grad is not None and own.grad.dtype == dtype
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=0.05, atol=0.05)
