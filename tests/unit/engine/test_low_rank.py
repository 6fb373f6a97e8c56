"""Low-rank updates are the same whether computed alone or along with others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ndif_actor.engine.low_rank import LowRank, compute_together, low_rank

#: Rows, in, out, rank, dtype of the model and of the factors.
SHAPES = st.tuples(
    st.sampled_from([(1, 1), (1, 5), (1, 6), (2, 3), (1, 64), (1, 65), (0, 4), ()]),
    st.sampled_from([4, 6]),
    st.sampled_from([3, 6]),
    st.sampled_from([1, 2]),
    st.sampled_from([torch.float64, torch.bfloat16]),
    st.sampled_from([torch.float64, torch.float32]),
)


def update(shape: tuple, seed: int, scaling: float = 0.5) -> LowRank:
    rows, size_in, size_out, rank, dtype, factors = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    return LowRank(
        draw(*rows, size_out, dtype=dtype),
        draw(*rows, size_in, dtype=dtype),
        draw(rank, size_in, dtype=factors),
        draw(size_out, rank, dtype=factors),
        scaling,
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(SHAPES, min_size=1, max_size=8))
def test_computed_together_every_update_is_its_own(shapes: list[tuple]) -> None:
    together = [update(shape, seed) for seed, shape in enumerate(shapes)]

    compute_together(together)

    for one in together:
        wide = [value.double() for value in (one.input, one.x, one.a, one.b)]
        wanted = wide[0] + 0.5 * wide[1] @ wide[2].mT @ wide[3].mT
        assert one.result().dtype == one.input.dtype
        exact = one.input.dtype == one.dtype == torch.float64
        near = 1e-12 if exact else 1e-5 if one.input.dtype == torch.float64 else 2e-2
        torch.testing.assert_close(one.result().double(), wanted, rtol=near, atol=near)


def test_updates_of_one_shape_are_one_product() -> None:
    products = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            products.extend([func] if func is torch.ops.aten.bmm.default else [])
            return func(*args, **(kwargs or {}))

    shape = ((1, 5), 4, 6, 2, torch.float64, torch.float64)
    together = [update(shape, seed) for seed in range(7)]
    with Count():
        compute_together(together)
        for one in together:
            one.result()
    assert len(products) == 2


def test_what_is_not_a_number_stays_with_whom_it_belongs_to() -> None:
    shape = ((1, 5), 4, 6, 2, torch.float64, torch.float64)
    alone = update(shape, 1).result()
    bad = update(((1, 7), *shape[1:]), 2)  # of another length, so it is padded along
    bad.x[:] = torch.nan
    bad.b[:] = torch.inf
    good = update(shape, 1)

    compute_together([bad, good])

    torch.testing.assert_close(good.result(), alone, rtol=1e-12, atol=1e-12)
    assert not bad.result().isfinite().any()


def test_gradients_are_those_of_each_alone() -> None:
    shape = ((1, 5), 4, 6, 2, torch.float64, torch.float64)
    for together in (True, False):
        asked = [update(shape, 1), update(((1, 7), *shape[1:]), 2)]
        factors = [value for one in asked for value in (one.x, one.a, one.b)]
        for value in factors:
            value.requires_grad_()
        if together:
            compute_together(asked)
        loss = sum(one.result().square().sum() for one in asked)
        found = torch.autograd.grad(loss, factors)
        if together:
            shared = found
    for one, other in zip(shared, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 5)}, r"x must be \[\.\.\., 5\]"),
        ({"a": torch.zeros(3, 4)}, r"a must be \[rank, in\] and b \[out, rank\]"),
        ({"b": torch.zeros(5, 2)}, r"input must be \[1, 5, 5\]"),
        ({"x": torch.zeros(5, 4)}, r"input must be \[5, 6\]"),
        ({"x": torch.zeros((), dtype=torch.long)}, "x must be a tensor of floats"),
        ({"scaling": "much"}, "alpha"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    fitting = {
        "input": torch.zeros(1, 5, 6),
        "x": torch.zeros(1, 5, 4),
        "a": torch.zeros(2, 4),
        "b": torch.zeros(6, 2),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        low_rank(**{**fitting, **change})
