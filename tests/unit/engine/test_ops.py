"""Every operation of the catalogue: the same on meta tensors as on real ones, and within bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ndif_actor.engine import ops
from ndif_client.wire.catalogue import CATALOGUE, Op
from ndif_client.wire.graph import Dots, Dtype, Items, Ref, Slice

CPU = torch.device("cpu")
META = torch.device("meta")

generator = torch.Generator().manual_seed(0)
X = torch.rand(3, 4, generator=generator) + 0.1
Y = torch.rand(3, 4, generator=generator) + 0.1
SQUARE = torch.rand(4, 4, generator=generator)
CUBE = torch.rand(2, 3, 4, generator=generator)
SYMMETRIC = SQUARE @ SQUARE.mT + torch.eye(4)
VECTOR = torch.rand(4, generator=generator)
MASK = X > 0.5
COUNTS = torch.arange(12).reshape(3, 4)
ROWS = torch.tensor([[0, 2, 1, 0]])
PICKED = torch.tensor([2, 0])

#: The arguments of each operation, as many as it takes by position; "like" names one whose
#: arguments fit as well.
EXAMPLES: dict[str, tuple[Any, ...]] = {
    "bitwise_not": (COUNTS,),
    "bitwise_and": (COUNTS, 6), "bitwise_or": (COUNTS, 6), "bitwise_xor": (COUNTS, 6),
    "pow": (X, 2.5), "add": (X, Y), "sub": (X, Y), "div": (X, Y), "rsub": (X, 1.0),
    "addcmul": (X, Y, Y), "addcdiv": (X, Y, Y), "lerp": (X, Y, 0.3), "clamp": (X, 0.2, 0.8),
    "round": (X,), "nan_to_num": (X, 0.0, 1.0, -1.0), "gelu": (X,), "leaky_relu": (X, 0.1),
    "elu": (X, 0.5), "softmax": (X, -1, torch.float64), "log_softmax": (X, -1, torch.float64),
    "normalize": (X, 2.0, -1, 1e-12), "layer_norm": (X, (4,), VECTOR, VECTOR, 1e-5),
    "rms_norm": (X, (4,), VECTOR, 1e-5), "sum": (X, -1, True), "mean": (X, (0, 1), True),
    "prod": (X, 0, True), "std": (X, -1), "var": (X, -1), "count_nonzero": (X, 0),
    "norm": (X, 2, -1, True), "max": (X, -1, True), "min": (X, -1, True),
    "median": (X, -1, True), "cumsum": (X, -1), "cumprod": (X, -1),
    "topk": (X, 2, -1, True, True), "sort": (X, -1, True, True), "argsort": (X, -1, True, True),
    "quantile": (X, 0.25, -1, True), "ldexp": (X, COUNTS),
    "matmul": (CUBE, SQUARE), "mm": (X, SQUARE),
    "bmm": (CUBE, CUBE.mT.contiguous()), "mv": (X, VECTOR), "dot": (VECTOR, VECTOR),
    "outer": (VECTOR, VECTOR), "einsum": ("bij,kj->bik", (CUBE, SQUARE)),
    "linear": (X, SQUARE, VECTOR), "matrix_exp": (SQUARE,), "qr": (X.mT.contiguous(), "reduced"),
    "svd": (X, False), "svdvals": (X,), "eigh": (SYMMETRIC, "L"), "eigvalsh": (SYMMETRIC, "L"),
    "cholesky": (SYMMETRIC,), "solve": (SYMMETRIC, X.mT.contiguous()), "inv": (SYMMETRIC,),
    "pinv": (X,), "det": (SQUARE,), "slogdet": (SQUARE,), "matrix_power": (SQUARE, 3),
    "addmm": (X, X, SQUARE), "baddbmm": (CUBE, CUBE, SQUARE.expand(2, 4, 4)),
    "imag": (torch.fft.rfft(X),), "softplus": (X, 2.0, 5.0), "hardtanh": (X, 0.2, 0.5),
    "threshold": (X, 0.5, 0.0), "celu": (X, 0.5), "prelu": (X, VECTOR),
    "allclose": (X, Y, 1e-3, 1e-3, True),
    "equal": (X, X), "var_mean": (X, -1), "std_mean": (X, -1), "aminmax": (X,),
    "cov": (X,), "corrcoef": (X,), "mode": (X, -1, True), "msort": (X,),
    "bucketize": (X, VECTOR.sort().values), "searchsorted": (X.sort().values, Y),
    "histc": (X, 5, 0.0, 1.0), "bincount": (PICKED, PICKED.float(), 7), "trapezoid": (X, Y),
    "inner": (X, Y), "lstsq": (SYMMETRIC, X.mT.contiguous()), "matrix_norm": (X, 2, (0, 1), True),
    "linalg_norm": (X, 2, (0, 1), True), "linalg_cross": (X[:, :3], Y[:, :3]),
    "linalg_diagonal": (CUBE,), "multi_dot": ((X, SQUARE, X.mT),), "vecdot": (X, Y),
    "logdet": (SYMMETRIC,), "addmv": (X[:, 0], X, VECTOR), "fft_fft": (X, 4, -1, "ortho"),
    "fft_ifft": (X, 4, -1, "ortho"), "fft_rfft": (X, 4, -1, "ortho"),
    "fft_irfft": (torch.fft.rfft(X), 4, -1, "ortho"), "conv1d": (CUBE, CUBE[:, :, :2], X[0, :2],
    1, 0, 1, 1), "avg_pool1d": (CUBE, 2, 1, 0), "scaled_dot_product_attention":
    (CUBE, CUBE, CUBE, None, 0.0, True, 0.3), "binary_cross_entropy": (X.sigmoid(), Y.sigmoid()),
    "cosine_embedding_loss": (X, Y, X[:, 0].sign()), "dist": (X, Y, 2.0),
    "margin_ranking_loss": (X, Y, X.sign()), "triplet_margin_loss": (X, Y, X * 2),
    "scatter_reduce": (X, 0, ROWS, Y, "amax"), "take": (X, PICKED), "t": (X,),
    "expand_as": (VECTOR, X), "tensor_split": (X, (1, 3), 1), "dstack": ((X, Y),),
    "column_stack": ((X, Y),), "block_diag": ((X, Y),), "meshgrid": ((VECTOR, X[0]), "xy"),
    "diag_embed": (X, 1, 0, 1), "tril_indices": (3, 4, 1), "triu_indices": (3, 4, 1),
    "new_zeros": (X, (2, 3)), "new_ones": (X, (2, 3)), "new_full": (X, (2, 3), 7.0),
    "low_rank": (SQUARE, SQUARE, X, X.mT.contiguous(), 0.5),
    "cross": (X[:, :3], Y[:, :3], -1), "trace": (SQUARE,),
    "nll_loss": (X.log(), torch.tensor([1, 3, -100])), "l1_loss": (X, Y),
    "smooth_l1_loss": (X, Y), "huber_loss": (X, Y), "binary_cross_entropy_with_logits": (X, Y),
    "pairwise_distance": (X, Y, 2.0, 1e-6, True), "logcumsumexp": (X, -1), "cummax": (X, -1),
    "cummin": (X, -1), "diff": (X, 1, -1), "kthvalue": (X, 2, -1, True), "glu": (X, -1),
    "tile": (X, (2, 1)), "isin": (COUNTS, PICKED),
    "cdist": (X, SQUARE, 2.0), "cosine_similarity": (X, Y, -1, 1e-8),
    "vector_norm": (X, 2, -1, True), "cross_entropy": (X, torch.tensor([1, 3, -100])),
    "kl_div": (X.log(), Y), "mse_loss": (X, Y), "getitem": (CUBE, (slice(None), -1, ...)),
    "setitem": (CUBE, (slice(None), -1), 0.0), "gather": (X, 0, ROWS),
    "scatter": (X, 0, ROWS, Y), "scatter_add": (X, 0, ROWS, Y), "index_select": (X, 0, PICKED),
    "index_add": (X, 0, PICKED, Y[:2]), "index_copy": (X, 0, PICKED, Y[:2]),
    "index_fill": (X, 0, PICKED, 0.5), "clamp_min": (X, 0.2), "clamp_max": (X, 0.2),
    "tensordot": (X, SQUARE, 1), "reshape_as": (X, X.mT),
    "unfold": (X, 1, 2, 1), "vstack": ((X, Y),), "hstack": ((X, Y),), "type_as": (X, COUNTS),
    "pad": (X, (1, 0), "constant", 2.0), "entr": (X,), "erfinv": (X / 3,),
    "take_along_dim": (X, ROWS, 0), "embedding": (PICKED, X), "one_hot": (PICKED, 4),
    "where": (MASK, X, 0.0), "masked_fill": (X, MASK, 0.0), "reshape": (X, (4, -1)),
    "view": (X, (4, -1)), "flatten": (CUBE, 1, 2), "unflatten": (X, 1, (2, 2)),
    "transpose": (CUBE, 1, 2), "permute": (CUBE, (2, 0, 1)), "movedim": (CUBE, (0, 1), (2, 0)),
    "squeeze": (X[:1], 0), "unsqueeze": (X, 1), "broadcast_to": (VECTOR, (3, 4)),
    "narrow": (X, 1, 1, 2), "select": (X, 1, -1), "diagonal": (CUBE, 1, 1, 2), "expand":
    (VECTOR, (3, -1)), "repeat": (X, (2, 1)), "split": (X, (1, 3), 1), "chunk": (X, 2, 1),
    "unbind": (X, 1), "cat": ((X, Y), 1), "stack": ((X, Y), 1), "flip": (X, (0, 1)),
    "roll": (X, (1, 2), (0, 1)), "repeat_interleave": (X, 2, 1), "tril": (SQUARE, 1),
    "triu": (SQUARE, 1), "diag": (VECTOR, 1), "to": (X, torch.bfloat16), "zeros": ((2, 3),),
    "ones": ((2, 3),), "full": ((2, 3), 7.0), "arange": (1, 9, 2), "linspace": (0.0, 1.0, 5),
    "eye": (2, 3), "full_like": (X, 7.0), "rand": ((2, 3),), "randn": ((2, 3),),
    "randint": (-2, 9, (2, 3)), "randperm": (5,), "dropout": (X, 0.25, True),
    "bernoulli": (X.clamp(max=1),), "multinomial": (X, 2, True),
}  # fmt: skip

#: Arguments that are given by name only.
KEYWORDS: dict[str, dict[str, Any]] = {
    "add": {"alpha": 2}, "sub": {"alpha": 2}, "div": {"rounding_mode": "floor"},
    "addcmul": {"value": 2.0}, "addcdiv": {"value": 2.0}, "round": {"decimals": 1},
    "gelu": {"approximate": "tanh"}, "var_mean": {"correction": 0, "keepdim": True},
    "std_mean": {"correction": 0, "keepdim": True}, "aminmax": {"dim": 0, "keepdim": True},
    "cov": {"correction": 0}, "cumsum": {"dtype": torch.float64}, "cumprod":
    {"dtype": torch.float64}, "quantile": {"interpolation": "nearest"},
    "bucketize": {"right": True}, "searchsorted": {"right": True}, "vecdot": {"dim": -1},
    "linalg_norm": {"dtype": torch.float64}, "linalg_cross": {"dim": -1},
    "linalg_diagonal": {"offset": 1, "dim1": -2, "dim2": -1},
    "addmv": {"beta": 0.5, "alpha": 2.0}, "binary_cross_entropy":
    {"weight": None, "reduction": "sum"}, "cosine_embedding_loss":
    {"margin": 0.1, "reduction": "sum"}, "margin_ranking_loss":
    {"margin": 0.1, "reduction": "sum"}, "triplet_margin_loss":
    {"margin": 0.5, "p": 2.0, "eps": 1e-6, "swap": True, "reduction": "sum"},
    "scatter_reduce": {"include_self": False}, "tril_indices": {"dtype": torch.int32},
    "triu_indices": {"dtype": torch.int32}, "new_zeros": {"dtype": torch.int64},
    "new_ones": {"dtype": torch.int64}, "new_full": {"dtype": torch.int64},
    "sum": {"dtype": torch.float64},
    "mean": {"dtype": torch.float64}, "prod": {"dtype": torch.float64},
    "std": {"correction": 0, "keepdim": True}, "var": {"correction": 0, "keepdim": True},
    "cross_entropy": {"weight": VECTOR, "ignore_index": -100, "reduction": "sum",
                      "label_smoothing": 0.1},
    "addmm": {"beta": 0.5, "alpha": 2.0}, "baddbmm": {"beta": 0.5, "alpha": 2.0},
    "nll_loss": {"weight": VECTOR, "ignore_index": -100, "reduction": "sum"},
    "l1_loss": {"reduction": "sum"}, "smooth_l1_loss": {"reduction": "sum", "beta": 0.5},
    "huber_loss": {"reduction": "sum", "delta": 0.5},
    "binary_cross_entropy_with_logits":
        {"weight": None, "reduction": "sum", "pos_weight": VECTOR},
    "kl_div": {"reduction": "batchmean", "log_target": False}, "mse_loss": {"reduction": "sum"},
    "zeros": {"dtype": torch.int64}, "ones": {"dtype": torch.int64},
    "full": {"dtype": torch.float64}, "arange": {"dtype": torch.float32},
    "linspace": {"dtype": torch.float64}, "eye": {"dtype": torch.float64},
    "zeros_like": {"dtype": torch.int64}, "ones_like": {"dtype": torch.int64},
    "full_like": {"dtype": torch.int64}, "rand": {"dtype": torch.float64},
    "randn": {"dtype": torch.float64}, "randint": {"dtype": torch.int32},
    "randperm": {"dtype": torch.int32}, "rand_like": {"dtype": torch.float64},
    "randn_like": {"dtype": torch.float64},
}  # fmt: skip


def by_position(op: Op) -> int:
    return op.parameters.index("*") if "*" in op.parameters else len(op.parameters)


def example(op: Op) -> tuple[Any, ...]:
    """Return arguments for all parameters of an operation that are taken by position."""
    if op.name in EXAMPLES:
        return EXAMPLES[op.name]
    return {1: (X,), 2: (X, Y), 3: (X, -1, True)}[by_position(op)]


def to_meta(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(to_meta, value))
    if isinstance(value, dict):
        return {name: to_meta(item) for name, item in value.items()}
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def described(value: ops.Value) -> Any:
    if isinstance(value, tuple):
        return [described(item) for item in value]
    return value.dtype, tuple(value.shape)


def assert_same(value: ops.Value, wanted: ops.Value) -> None:
    torch.testing.assert_close(value, wanted, rtol=0, atol=0, equal_nan=True)


every_op = pytest.mark.parametrize("op", CATALOGUE.values(), ids=lambda op: op.name)


@every_op
def test_every_op_has_on_meta_the_shape_and_dtype_it_has_on_a_device(op: Op) -> None:
    args, kwargs = example(op), KEYWORDS.get(op.name, {})
    ops.bind(op, args, kwargs)

    real = ops.apply(op, args, kwargs, CPU)
    meta = ops.apply(op, to_meta(args), to_meta(kwargs), META)

    assert described(meta) == described(real)
    first = meta[0] if isinstance(meta, tuple) else meta
    assert first.is_meta


@every_op
def test_every_op_takes_all_its_arguments_by_the_names_in_the_catalogue(op: Op) -> None:
    args, keywords = example(op), KEYWORDS.get(op.name, {})
    assert len(args) == by_position(op), "the example leaves out an argument"
    assert {*op.parameters[len(args) + 1 :]} == {*keywords}, "the example leaves out a keyword"
    named = dict(zip(op.parameters, args, strict=False)) | keywords
    ops.bind(op, (), named)

    assert_same(ops.apply(op, (), named, CPU), ops.apply(op, args, keywords, CPU))


@every_op
def test_no_op_changes_its_arguments(op: Op) -> None:
    args = example(op)
    before = [a.clone() for a in args if isinstance(a, torch.Tensor)]

    ops.apply(op, args, KEYWORDS.get(op.name, {}), CPU)

    assert_same(tuple(a for a in args if isinstance(a, torch.Tensor)), tuple(before))


@every_op
def test_every_op_with_several_results_names_them(op: Op) -> None:
    result = ops.apply(op, example(op), KEYWORDS.get(op.name, {}), CPU)

    if isinstance(result, tuple):
        assert op.name in ("split", "chunk", "tensor_split", "unbind", "meshgrid") or len(
            op.fields
        ) == len(result)


def test_an_op_gives_what_torch_gives() -> None:
    assert_same(ops.apply(CATALOGUE["topk"], (X, 2), {}, CPU), tuple(X.topk(2)))
    assert_same(ops.apply(CATALOGUE["argsort"], (X,), {"descending": True}, CPU),
                X.argsort(descending=True))  # fmt: skip
    assert_same(ops.apply(CATALOGUE["repeat"], (X, (2, 1)), {}, CPU), X.repeat(2, 1))


def test_setitem_returns_a_changed_copy() -> None:
    changed = ops.apply(CATALOGUE["setitem"], (CUBE, (slice(None), -1), 0.0), {}, CPU)

    wanted = CUBE.clone()
    wanted[:, -1] = 0
    assert_same(changed, wanted)


# ---------------------------------------------------------------- arguments


def test_arguments_of_a_graph_become_those_of_torch() -> None:
    argument = Items([Ref(3), Slice(None, -1, 2), Dots(), Dtype("int64"), None, 2, "sum"])

    resolved = ops.resolve(argument, lambda node: f"value {node}")

    assert resolved == ("value 3", slice(None, -1, 2), ..., torch.int64, None, 2, "sum")


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "message"),
    [
        ("neg", (X, 1), {}, "neg takes at most 1 arguments by position, not 2"),
        ("add", (X, Y, 2), {}, "add takes at most 2 arguments by position, not 3"),
        ("sum", (X,), {"axis": 0}, "sum has no argument 'axis'; it has input, dim, keepdim, dtype"),
        ("sum", (X, 0), {"dim": 0}, "sum got 'dim' twice"),
        ("add", (X, Y), {"*": 1}, "add has no argument '*'"),
        ("relu", (X,), {"out": X}, "relu has no argument 'out'"),
    ],
)
def test_arguments_an_op_does_not_have_are_refused(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError) as caught:
        ops.bind(CATALOGUE[name], args, kwargs)

    assert message in str(caught.value)


# ---------------------------------------------------------------- bounds

far = torch.tensor([0, 9])


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("getitem", (X, far), {}),
        ("getitem", (X, (slice(None), far)), {}),
        ("getitem", (X, (..., far)), {}),
        ("getitem", (X, (None, far)), {}),
        ("getitem", (X, torch.tensor([-4])), {}),
        ("getitem", (X, ((0, 9),)), {}),
        ("getitem", (), {"input": X, "index": far}),
        ("setitem", (X, far, 0.0), {}),
        ("setitem", (X, (slice(None), ((0, 9),)), 0.0), {}),
        ("gather", (X, 0, torch.tensor([[9, 0, 0, 0]])), {}),
        ("gather", (X, 0, torch.tensor([[-1, 0, 0, 0]])), {}),
        ("gather", (), {"input": X, "dim": 1, "index": torch.tensor([[4]])}),
        ("scatter", (X, 1, torch.tensor([[4]]), Y), {}),
        ("scatter_add", (X, 1, torch.tensor([[4]]), Y), {}),
        ("index_select", (X, 1, torch.tensor([4])), {}),
        ("index_add", (X, 0, torch.tensor([3]), Y[:1]), {}),
        ("index_copy", (X, 0, torch.tensor([3]), Y[:1]), {}),
        ("take_along_dim", (X, torch.tensor([12])), {}),
        ("take_along_dim", (X, torch.tensor([[3, 0, 0, 0]]), 0), {}),
        ("embedding", (far, X), {}),
        ("one_hot", (far, 4), {}),
        ("cross_entropy", (X, torch.tensor([0, 1, 4])), {}),
        ("cross_entropy", (X, torch.tensor([0, 1, -5])), {}),
        ("cross_entropy", (X, torch.tensor([0, 1, -100])), {"ignore_index": -1}),
    ],
)
def test_an_index_out_of_range_is_found_before_the_kernel_starts(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ops._CALLABLES, name, lambda *_, **__: pytest.fail("the kernel started"))

    with pytest.raises(IndexError, match="is out of range"):
        ops.apply(CATALOGUE[name], args, kwargs, CPU)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("getitem", (X, torch.tensor([-3, 2])), {}),
        ("getitem", (X, ((0, -1),)), {}),
        ("cross_entropy", (X, torch.tensor([0, 3, -100])), {}),
        ("cross_entropy", (X, torch.tensor([0, 3, 77])), {"ignore_index": 77}),
        ("cross_entropy", (X, Y), {}),
        ("take_along_dim", (X, torch.tensor([11])), {}),
        ("gather", (X, 0, torch.zeros(0, 4, dtype=torch.int64)), {}),
    ],
)
def test_an_index_in_range_is_let_pass(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    ops.apply(CATALOGUE[name], args, kwargs, CPU)


def test_a_list_of_numbers_indexes_as_it_does_in_torch() -> None:
    assert_same(ops.apply(CATALOGUE["getitem"], (X, ((2, 0),)), {}, CPU), X[[2, 0]])
    assert_same(ops.apply(CATALOGUE["getitem"], (X, (slice(None), (1, 1))), {}, CPU), X[:, [1, 1]])


def test_a_boolean_mask_as_index_is_refused_with_what_to_use_instead() -> None:
    with pytest.raises(IndexError, match="use where"):
        ops.apply(CATALOGUE["getitem"], (X, MASK), {}, CPU)
    with pytest.raises(IndexError, match="use where"):
        ops.apply(CATALOGUE["getitem"], (to_meta(X), to_meta(MASK)), {}, META)


def test_one_hot_needs_the_number_of_classes() -> None:
    with pytest.raises(ValueError, match="needs num_classes"):
        ops.apply(CATALOGUE["one_hot"], (PICKED, -1), {}, CPU)


def test_a_tuple_of_tensors_is_indexed_by_a_number() -> None:
    pair = tuple(X.max(-1))

    assert_same(ops.apply(CATALOGUE["getitem"], (pair, 1), {}, CPU), pair[1])
    with pytest.raises(TypeError, match="one number or slice"):
        ops.apply(CATALOGUE["getitem"], (pair, (slice(None), 0)), {}, CPU)


@pytest.mark.parametrize("mask", [MASK[:2], MASK[:, :3], MASK[None]])
def test_a_mask_of_another_shape_is_refused(mask: torch.Tensor) -> None:
    with pytest.raises(IndexError, match="a mask of shape"):
        ops.apply(CATALOGUE["setitem"], (X, mask, 0.0), {}, torch.device("cpu"))


def test_as_many_values_as_a_mask_is_true_are_refused() -> None:
    with pytest.raises(IndexError, match="depends on values"):
        ops.apply(CATALOGUE["setitem"], (X, MASK, X[MASK]), {}, torch.device("cpu"))
