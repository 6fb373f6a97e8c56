"""Operators, torch functions and catalogue methods record what torch would do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ndif_client import Session, ops
from ndif_client.errors import (
    ClosedTraceError,
    GraphError,
    LimitError,
    NoValueError,
    UnknownNameError,
    ValueUnknownError,
)
from ndif_client.proxy import Proxy
from ndif_client.wire.catalogue import CATALOGUE
from ndif_client.wire.graph import Apply, Constant, HookPoint
from tests.unit.client.trees import TOKENS, evaluate, finished_graph, make_session, scratch

HOOK = HookPoint("model.layers.0", "output")
PROMPT = [1] * TOKENS

ROW = torch.linspace(0.5, 2.0, 6)
MATRIX = torch.linspace(-1, 1, 18).reshape(6, 3)
ARRAY = np.linspace(0.5, 2.0, 6, dtype=np.float32)


def _activations() -> torch.Tensor:
    return torch.randn(1, TOKENS, 6, generator=torch.Generator().manual_seed(3))


EXPRESSIONS: list[Callable[[Any], Any]] = [
    # numbers on either side
    lambda h: h + 2,
    lambda h: 2 + h,
    lambda h: 2 - h,
    lambda h: h - 2.5,
    lambda h: 3 * h / 2,
    lambda h: 1 / h,
    lambda h: 7 // h,
    lambda h: h // 2,
    lambda h: h % 2,
    lambda h: 5 % h,
    lambda h: h**2,
    lambda h: 2**h,
    lambda h: -h,
    lambda h: +h,
    lambda h: abs(h),
    lambda h: round(h, 1) if isinstance(h, Proxy) else h.round(decimals=1),
    lambda h: math.ceil(h) if isinstance(h, Proxy) else h.ceil(),
    # comparisons and masks
    lambda h: (h > 0) & (h < 1),
    lambda h: ~(h >= 0) | (h == 0),
    lambda h: (h != 0) ^ (h <= 0),
    lambda h: True & (h > 0),
    # tensors and arrays on either side
    lambda h: h + ROW,
    lambda h: ROW - h,
    lambda h: ROW * h,
    lambda h: ROW / h,
    lambda h: h < ROW,
    lambda h: h @ MATRIX,
    lambda h: MATRIX.T @ h.transpose(1, 2),
    lambda h: (ARRAY if isinstance(h, Proxy) else torch.tensor(ARRAY)) - h,
    lambda h: h * np.float32(2),
    lambda h: np.float32(2) * h if isinstance(h, Proxy) else 2 * h,
    lambda h: ARRAY @ h.mT if isinstance(h, Proxy) else torch.tensor(ARRAY) @ h.mT,
    # methods, in torch's several ways to call them
    lambda h: h.view(-1, 3),
    lambda h: h.reshape((2, -1)),
    lambda h: h.permute(2, 0, 1),
    lambda h: h.expand(5, -1, -1),
    lambda h: h.repeat(2, 1, 1),
    lambda h: h.flip(0, 1),
    lambda h: h.mean(dim=(0, 1)),
    lambda h: h.mean(axis=-1, keepdim=True),
    lambda h: h.std(-1, unbiased=False),
    lambda h: h.sum(-1, dtype=torch.float64),
    lambda h: h.softmax(-1),
    lambda h: h.clip(min=0),
    lambda h: h[0].T,
    lambda h: h.mT,
    lambda h: h.to(torch.float64).double().half().float(),
    lambda h: h.to("cpu").cpu().contiguous().detach(),
    lambda h: h.to(dtype=torch.int32).long(),
    lambda h: (h > 0).int(),
    lambda h: h.argmax(-1),
    lambda h: h.max(),
    lambda h: h.max(ROW),
    lambda h: h.median(-1).values,
    lambda h: h.max(-1).indices,
    lambda h: h.min(dim=-1)[0],
    lambda h: h.topk(2).indices,
    lambda h: h.sort(descending=True)[1],
    lambda h: h.chunk(2, dim=-1)[1],
    lambda h: h.split([1, 5], dim=-1)[1],
    lambda h: h.unbind(1)[2],
    lambda h: sum(h.chunk(3, dim=-1)),
    lambda h: h[torch.arange(TOKENS).remainder(1)],
    lambda h: h[:, h[0, :, 0].argmax()],
    lambda h: h[:, np.int64(1)],
    lambda h: h[..., None, 1],
    # torch's own functions
    lambda h: torch.softmax(h, -1),
    lambda h: F.softmax(h, dim=-1),
    lambda h: F.log_softmax(h, -1, dtype=torch.float64),
    lambda h: torch.cat([h, ROW.expand(1, 1, 6)], dim=1),
    lambda h: torch.stack((h, h)),
    lambda h: torch.einsum("bth,hk->btk", h, MATRIX),
    lambda h: torch.where(h > 0, h, 0.0),
    lambda h: torch.where(ROW > 1, ROW, h),
    lambda h: torch.topk(h, 3).values,
    lambda h: torch.linalg.vector_norm(h, dim=-1),
    lambda h: torch.norm(h, dim=-1),
    lambda h: torch.max(h, dim=-1).values,
    lambda h: torch.zeros_like(h),
    lambda h: F.layer_norm(h, (6,)),
    lambda h: F.rms_norm(h, (6,), eps=1e-6),
    lambda h: F.normalize(h, dim=-1),
    lambda h: F.gelu(h, approximate="tanh"),
    lambda h: F.silu(h) + F.relu(h),
    lambda h: F.linear(h, MATRIX.T),
    lambda h: F.mse_loss(h, torch.ones(1, TOKENS, 6)),
    lambda h: F.cross_entropy(h[0], torch.tensor([1, 2, 3, 0])),
    lambda h: F.kl_div(F.log_softmax(h, -1), F.softmax(h, -1), reduction="batchmean"),
    lambda h: F.one_hot(h.argmax(-1), 6),
    lambda h: F.embedding(h.argmax(-1), MATRIX),
    lambda h: F.cosine_similarity(h, ROW, dim=-1),
    lambda h: torch.cdist(h, h),
    lambda h: torch.clamp(h, min=0.1, max=0.5),
    lambda h: torch.logical_not(h > 0),
    lambda h: torch.gather(h, -1, torch.zeros(1, TOKENS, 2, dtype=torch.int64)),
    # what these leave out or say otherwise changes their meaning
    lambda h: F.dropout(h, 0.5, training=False),
    lambda h: torch.nn.Dropout(0.5).eval()(h),
    lambda h: F.relu(h - 0.5, inplace=True),
    lambda h: torch.std(h, unbiased=False),
    lambda h: h.std(-1, False),
    lambda h: torch.linalg.norm(h[0], 2),
    lambda h: torch.linalg.norm(h, 1, (-2, -1)),
    lambda h: torch.linalg.diagonal(h),
    lambda h: torch.svd(h[0]).V.abs(),
    lambda h: h[0].svd()[2].abs() * h[0].svd().S,
    lambda h: torch.linalg.matrix_exp(h[0, :, :TOKENS]),
    lambda h: torch.linalg.cross(h[..., :3], h[..., 3:]),
    lambda h: torch.equal(h, h) if isinstance(h, Proxy) else torch.tensor(True),
    lambda h: h.equal(h + 1) if isinstance(h, Proxy) else torch.tensor(False),
    lambda h: F.cross_entropy(h[0], torch.tensor([1, 2, 3, 0]), weight=torch.arange(6.0)),
    lambda h: F.cross_entropy(h[0], h[0].softmax(-1)),
    lambda h: F.softplus(h, beta=2),
    lambda h: torch.cumsum(h, -1, dtype=torch.float64),
    lambda h: torch.zeros_like(h, device="cpu", requires_grad=False),
    lambda h: h.new_zeros(2, 3),
    lambda h: h[0].t() @ h[0].ravel().expand_as(h[0].ravel()).reshape(TOKENS, 6),
    lambda h: torch.fft.rfft(h, dim=-1).abs(),
    lambda h: F.scaled_dot_product_attention(h, h, h, is_causal=True),
    lambda h: torch.block_diag(h[0], h[0]),
    lambda h: torch.meshgrid(h[0, 0], h[0, 1], indexing="ij")[1],
    lambda h: torch.tensor_split(h, 3, dim=-1)[1],
    lambda h: h.where(h > 0.5, 0.0),
    lambda h: h.to(torch.tensor(1, dtype=torch.float64)),
    lambda h: h.long().to(h),
    lambda h: h[0, (h[0, :, 0] > 100).sum()],
    lambda h: copy.deepcopy(h) + copy.copy(h),
    lambda h: np.sqrt(h) if isinstance(h, Proxy) else h.sqrt(),
    lambda h: np.maximum(ARRAY, h) if isinstance(h, Proxy) else torch.tensor(ARRAY).maximum(h),
]


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=range(len(EXPRESSIONS)))
def test_an_expression_records_what_torch_computes(expression: Callable[[Any], Any]) -> None:
    session = make_session()
    with session.trace(PROMPT) as trace:
        expression(session.model.model.layers[0].output).save("y")
    got = evaluate(trace, {(HOOK, 0): _activations()}).saved["y"]

    expected = expression(_activations())

    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.allclose(got.double(), expected.double(), atol=1e-6, equal_nan=True)


def test_a_module_of_torch_can_be_applied_to_a_proxy(session: Session, model: Any) -> None:
    probe = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.LayerNorm(4))

    with session.trace(PROMPT) as trace:
        probe(model.model.layers[0].output).save("y")
    got = evaluate(trace, {(HOOK, 0): _activations()})

    assert torch.allclose(got.saved["y"], probe(_activations()), atol=1e-6)


def test_the_functions_of_ops_take_what_torchs_take(session: Session, model: Any) -> None:
    with session.trace(PROMPT) as trace:
        h = model.model.layers[0].output
        mask = ops.tril(ops.ones(TOKENS, TOKENS))
        ops.where(mask[:, :1] > 0, h, 0.0).save("where")
        ops.concat([h, ops.zeros((1, 2, 6), dtype="float32")], 1).save("cat")
        ops.einsum("bth,bsh->bts", h, h).save("einsum")
        ops.arange(3).save("arange")
    got = evaluate(trace, {(HOOK, 0): _activations()}).saved

    h = _activations()
    assert torch.equal(got["where"], torch.where(torch.ones(TOKENS, 1) > 0, h, 0.0))
    assert torch.equal(got["cat"], torch.cat([h, torch.zeros(1, 2, 6)], 1))
    assert torch.allclose(got["einsum"], h @ h.mT, atol=1e-6)
    assert torch.equal(got["arange"], torch.arange(3))


def test_every_operation_of_the_catalogue_is_offered_as_a_function_and_most_as_a_method() -> None:
    assert set(CATALOGUE) <= set(dir(ops))
    missing = [name for name, op in CATALOGUE.items() if op.method and not hasattr(Proxy, name)]

    assert missing == []
    assert ops.topk.__doc__ == CATALOGUE["topk"].doc


def test_a_tuple_of_results_unpacks_where_its_length_is_known(session: Session, model: Any) -> None:
    with scratch(session):
        h = model.model.layers[0].output
        values, indices = h.topk(5)
        first, second = h.chunk(2, -1)
        assert len({values, indices, first, second}) == 4
        assert len(h.split([1, 2, 3])) == 3
        with pytest.raises(ValueUnknownError, match="can't reach"):
            _first, _second = h.split(2)
        with pytest.raises(GraphError, match=r"use one of them \(values, indices\)"):
            h.topk(5) + 1


def test_constants_are_copied_when_they_are_recorded(session: Session, model: Any) -> None:
    vector = torch.ones(6)

    with session.trace(PROMPT) as trace:
        (model.model.layers[0].output * 0 + vector).save("y")
    vector[:] = 5

    got = evaluate(trace, {(HOOK, 0): _activations()})
    assert torch.equal(got.saved["y"], torch.ones(1, TOKENS, 6))


def test_equal_constants_are_sent_once(session: Session, model: Any) -> None:
    vector = np.ones(6, dtype=np.float32)

    with session.trace(PROMPT) as trace:
        for layer in model.model.layers:
            layer.output += vector
        model.model.norm.output += vector * 2
    graph = finished_graph(trace)

    assert sum(isinstance(node, Constant) for node in graph.nodes) == 2
    assert len(trace._recorder.buffers) == 2


def test_bfloat16_constants_travel_as_they_are(session: Session, model: Any) -> None:
    vector = torch.tensor([1.0, 2.5], dtype=torch.bfloat16)

    with session.trace(PROMPT) as trace:
        (vector * 1).sum()
        ops.clone(vector).save("v")

    got = evaluate(trace, {})
    assert torch.equal(got.saved["v"], vector)


UNANSWERABLE: list[tuple[Callable[[Any], Any], str]] = [
    (lambda h: bool(h), "ops.where"),
    (lambda h: 1 if h > 0 else 2, "ops.where"),
    (lambda h: len(h), "asked of the server, and can't reach"),
    (lambda h: list(h), "asked of the server"),
    (lambda h: 3 in h, r"\.any\(\)"),
    (lambda h: float(h), r"\.value"),
    (lambda h: int(h), r"\.value"),
    (lambda h: range(h), "h\\[:, position\\]"),
    (lambda h: np.asarray(h), "ndif_client.ops"),
    (lambda h: h.shape[-1], "asked of the server"),
    (lambda h: h.size(0), "asked of the server"),
    (lambda h: h.item(), r"\.value\.item\(\)"),
    (lambda h: h.tolist(), r"\.value\.tolist\(\)"),
    (lambda h: h.numpy(), r"\.value\.numpy\(\)"),
]


@pytest.mark.parametrize(("ask", "advice"), UNANSWERABLE, ids=range(len(UNANSWERABLE)))
def test_what_only_the_server_knows_is_refused_with_advice(
    session: Session, model: Any, ask: Callable[[Any], Any], advice: str
) -> None:
    with scratch(session), pytest.raises(ValueUnknownError, match=advice) as refused:
        ask(model.model.layers[0].output)

    assert "lambda h" in str(refused.value)  # the user's line


IMPOSSIBLE: list[tuple[Callable[[Any], Any], str]] = [
    (lambda h: h.softmax(-1, None, 3), "at most 3 arguments by position: softmax"),
    (lambda h: h.softmax(-1, dim=1), "got 'dim' twice"),
    (lambda h: h.softmax(wrong=1), "no argument 'wrong' here: softmax"),
    (lambda h: h + object(), "object can't be part of a graph"),
    (lambda h: h + make_session().model, r"did you mean its \.output"),
    (lambda h: h[1.5], "can't be an index"),
    (lambda h: h["a"], "can't be an index"),
    (lambda h: h[: h.argmax()], "bounds of a slice are known numbers"),
    (lambda h: h[[h.argmax()]], r"ops\.stack"),
    (lambda h: h + 2**70, "64 bits"),
    (lambda h: h + np.ones(2, dtype="U3"), "can't be sent"),
    (lambda h: h.to("nowhere"), "neither a dtype nor a device"),
    (lambda h: torch.linalg.solve(h, h, left=False), "no argument 'left'"),
    (lambda h: F.mse_loss(h, h, reduce=False), "no argument 'reduce'"),
    (lambda h: h.qr(), r"use ops\.qr"),
    (lambda h: torch.autograd.grad(h, h, h, is_grads_batched=True), "one backward for each"),
    (lambda h: h.register_hook(print), r"inside of `with loss\.backward"),
    (lambda h: f"{h:.2f}", "its number"),
    (lambda h: torch.ones(6).add_(h), "tensor of this machine can't be changed"),
    (lambda h: torch.ones(6).__setitem__(0, h), "tensor of this machine can't be changed"),
    (lambda h: torch.ones(6)[h], "can't be indexed by a value"),
    (lambda h: torch.fft.fft2(h), "fft.*not in the catalogue"),
]


@pytest.mark.parametrize(("call", "message"), IMPOSSIBLE, ids=range(len(IMPOSSIBLE)))
def test_a_call_that_can_never_work_is_refused_at_the_users_line(
    session: Session, model: Any, call: Callable[[Any], Any], message: str
) -> None:
    with scratch(session), pytest.raises(GraphError, match=message) as refused:
        call(model.model.layers[0].output)

    assert refused.value.fault is not None
    assert refused.value.fault.source is not None
    assert refused.value.fault.source.file == __file__


def test_an_unknown_operation_suggests_the_right_one(session: Session, model: Any) -> None:
    with scratch(session):
        h = model.model.layers[0].output
        with pytest.raises(UnknownNameError, match=r"did you mean \.softmax\(\.\.\.\)"):
            h.softmx(-1)
        with pytest.raises(UnknownNameError, match=r"did you mean ops\.cumsum"):
            ops.cumsun(h, -1)
        assert not hasattr(h, "fft")
        assert not hasattr(h, "__len_hint__")


def test_a_value_of_another_trace_is_refused_with_both_lines(session: Session, model: Any) -> None:
    with scratch(session):
        foreign = model.model.layers[0].output  # made here
    with scratch(session):
        own = model.model.layers[0].output
        with pytest.raises(ClosedTraceError, match="one trace is used in another") as refused:
            own + foreign  # used there
        with pytest.raises(ClosedTraceError, match="this trace has ended"):
            foreign + 1

    assert "used there" in str(refused.value)
    assert "made here" in str(refused.value)


def test_nothing_can_be_read_outside_of_a_trace(model: Any) -> None:
    with pytest.raises(ClosedTraceError, match="only inside of a trace"):
        _ = model.model.layers[0].output
    with pytest.raises(ClosedTraceError, match="only inside of a trace"):
        ops.zeros(3)


def test_a_value_exists_only_after_the_trace_has_run(session: Session, model: Any) -> None:
    with session.trace(PROMPT) as trace:
        saved = model.model.layers[0].output.save()
        unsaved = model.model.layers[1].output
        with pytest.raises(NoValueError, match="has not run"):
            _ = saved.value
    with pytest.raises(NoValueError, match=r"call \.save\(\)"):
        _ = unsaved.value
    trace._recorder.failure = RuntimeError("the device melted")
    with pytest.raises(NoValueError, match="the device melted"):
        _ = saved.value


def test_a_graph_is_bounded(session: Session, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ndif_client.recorder.MAX_NODES", 10)

    with scratch(session), pytest.raises(LimitError, match="at most 10 operations"):
        h = model.model.layers[0].output
        for _ in range(20):
            h = h + 1


def test_proxies_can_be_keys_and_shown(session: Session, model: Any) -> None:
    with scratch(session) as trace:
        h = model.model.layers[0].output
        assert {h: 1}[h] == 1
        assert "model.layers.0.output" in repr(h)
        assert "test_proxy.py" in f"{h + 1}"
    assert sum(isinstance(node, Apply) for node in finished_graph(trace).nodes) == 1


def test_a_dtype_may_be_given_by_name_and_a_device_is_passed_over(
    session: Session, model: Any
) -> None:
    with scratch(session):
        h = model.model.layers[0].output
        assert h.to("cuda:0") is h and h.to("cpu") is h
        for name in ("float64", "torch.bfloat16"):
            cast = h.to(name)
            node = cast._recorder._nodes[cast._node]
            assert node.op == "to" and node.args[1].name == name.removeprefix("torch.")  # type: ignore[union-attr]
        with pytest.raises(GraphError, match="neither a dtype nor a device"):
            h.to("flaot32")
