"""Graphs no client would record: refused with the line they come from, or harmless when run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ndif_actor.errors import RequestError
from ndif_client.wire.catalogue import CATALOGUE
from ndif_client.wire.graph import (
    PREFILL,
    Apply,
    Argument,
    Backward,
    CallModule,
    Constant,
    Dots,
    Dtype,
    Held,
    HookPoint,
    Items,
    Keep,
    Node,
    Parameter,
    ReadGradient,
    ReadHook,
    Ref,
    Save,
    Slice,
    WriteGradient,
    WriteHook,
)
from ndif_client.wire.messages import Fault
from ndif_client.wire.tensors import TensorSpec
from tests.conftest import LoadEngine, LoadOracle
from tests.requests import EXACT, Recorder, Request, assert_equal, run, run_and_save, saved

PROMPT = [1, 2, 3]
LENGTHS = [[3]]

numbers = st.one_of(
    st.integers(-4, 6),
    st.sampled_from([2**31, -(2**63), 2**63, 2**64 - 1]),
    st.floats(-3, 3),
    st.sampled_from([float("nan"), float("inf"), 1e308]),
)
dtypes = st.sampled_from(["bool", "uint8", "int64", "float16", "bfloat16", "float64", "complex64"])
simple: st.SearchStrategy[Argument] = st.one_of(
    st.integers(0, 7).map(Ref),
    st.integers(0, 7).map(Ref),
    numbers,
    st.booleans(),
    st.none(),
    st.builds(Dots),
    st.builds(Dtype, dtypes),
    st.builds(Slice, st.none() | st.integers(-4, 4), st.none() | st.integers(-4, 4)),
    st.sampled_from(["mean", "sum", "none", "tanh", "floor", "...ij,kj->...ik", ""]),
)
arguments = st.one_of(simple, st.lists(simple, max_size=3).map(Items))
hooks = st.sampled_from(
    [
        HookPoint("model.layers.1", "output"),
        HookPoint("model.layers.0.mlp", "input", "args.0"),
        HookPoint("model.embed_tokens", "input", "args.0"),
        HookPoint("lm_head", "output"),
        HookPoint("", "input", "kwargs.attention_mask"),
    ]
)
paths = st.sampled_from(
    ["lm_head", "model.norm", "model.layers.0.mlp", "model.embed_tokens", "model.rotary_emb"]
)


@st.composite
def applications(draw: st.DrawFn) -> Apply:
    op = draw(st.sampled_from(sorted(CATALOGUE)))
    names = [name for name in CATALOGUE[op].parameters if name != "*"]
    args = draw(st.lists(arguments, max_size=len(names)))
    kwargs = draw(st.dictionaries(st.sampled_from(names), arguments, max_size=2))
    return Apply(op, args, kwargs)


refs = st.integers(0, 9).map(Ref)
nodes: st.SearchStrategy[Node] = st.one_of(
    applications(),
    applications(),
    applications(),
    st.builds(ReadHook, hooks),
    st.builds(WriteHook, hooks, arguments),
    st.builds(CallModule, paths, st.lists(arguments, max_size=2)),
    st.integers(0, 9).map(lambda node: Save(Ref(node))),
    st.builds(Backward, refs, st.none() | refs),
    st.builds(ReadGradient, st.integers(0, 9), refs),
    st.builds(WriteGradient, st.integers(0, 9), refs, arguments),
    st.integers(0, 9).map(lambda node: Keep(Ref(node), "w")),
    st.just(Held("w")),
)

OPENING: list[Node] = [
    ReadHook(HookPoint("model.layers.0", "output")),
    Parameter("model.norm.weight"),
    Constant(TensorSpec("int64", (2,), 0)),
    Apply("topk", [Ref(0), 2]),
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's advice on losses
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(graph=st.lists(nodes, min_size=1, max_size=6))
def test_any_graph_is_refused_or_runs_and_never_touches_its_neighbour(
    graph: list[Node], load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    engine = load_engine("llama")
    recorder = Recorder()
    recorder.nodes = [*OPENING, *graph]
    recorder.buffers = [bytes(16)]
    request = Request(recorder, [[PROMPT]])

    try:
        price = engine.blueprint.check(recorder.graph(), LENGTHS, [memoryview(bytes(16))])
    except RequestError as error:
        assert error.fault.kind == "graph"
        assert error.fault.source is not None
        return
    if price.value_bytes > 1 << 24:
        return  # admission refuses it

    watcher = Recorder()
    watcher.save(watcher.read("output[logits]"))
    results, buffers = run(engine, [request, Request(watcher, [[PROMPT]])])
    wanted = {1: load_oracle("llama").logits(PROMPT)}
    assert_equal(saved(results[1], buffers), wanted, EXACT)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's advice on losses
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(graph=st.lists(nodes, max_size=4))
def test_any_graph_with_gradients_is_refused_or_runs_beside_others(
    graph: list[Node], load_engine: LoadEngine
) -> None:
    engine = load_engine("llama")
    recorder = Recorder()
    value = recorder.read("model.layers.0.output")
    loss = recorder.apply("sum", recorder.apply("sin", recorder.read("output[logits]")))
    backward = recorder.backward(loss)
    recorder.save(recorder.gradient(backward, value))
    (wanted,) = run_and_save(engine, [Request(recorder, [[PROMPT]])])
    neighbour = Request(recorder, [[PROMPT]])
    recorder = Recorder()
    recorder.nodes = [*neighbour.recorder.nodes, *graph]
    recorder.steps = [PREFILL] * len(recorder.nodes)
    request = Request(recorder, [[PROMPT]])

    try:
        price = engine.blueprint.check(recorder.graph(), LENGTHS, [])
    except RequestError as error:
        assert error.fault.kind == "graph"
        return
    if price.value_bytes > 1 << 24:
        return  # admission refuses it

    results, buffers = run(engine, [neighbour, request, neighbour])
    for mine in (results[0], results[2]):
        assert_equal(saved(mine, buffers), wanted, EXACT)


# ---------------------------------------------------------------- refused, in words


def refused(recorder: Recorder, load_engine: LoadEngine) -> Fault:
    buffers = [memoryview(raw) for raw in recorder.buffers]
    with pytest.raises(RequestError) as caught:
        load_engine("llama").blueprint.check(recorder.graph(), LENGTHS, buffers)
    fault = caught.value.fault
    assert fault.node is not None
    assert fault.source is not None and fault.source.line == fault.node + 1
    return fault


REFUSED: dict[str, tuple[Any, str]] = {
    "an unknown operation": (
        lambda r, h: r.apply("absolute", h),
        "absolute(float64[1, 3, 48]): 'absolute' is not in the catalogue of operations; it is "
        "called 'abs' here",
    ),
    "shapes that do not fit": (
        lambda r, h: r.apply("matmul", h, h),
        "matmul(float64[1, 3, 48], float64[1, 3, 48]): ",
    ),
    "products of unequal dtypes": (
        lambda r, h: r.call("lm_head", r.constant(torch.zeros(1, 48))),
        "lm_head(float32[1, 48]): float32 and float64 can't be multiplied; convert one with",
    ),
    "integers where no embedding looks them up": (
        lambda r, h: r.call("model.norm", r.apply("argmax", h, -1)),
        "only embeddings take integers",
    ),
    "a module that attends": (
        lambda r, h: r.call("model.layers.1", h),
        "'model.layers.1' attends, so it can't be called on a value",
    ),
    "the model itself": (lambda r, h: r.call("", h), "'the model' attends"),
    "an unknown module": (lambda r, h: r.call("model.norms", h), "no module 'model.norms'"),
    "an unknown parameter": (
        lambda r, h: r.parameter("model.norm.bias"),
        "model.norm has no parameter 'bias'; it has weight",
    ),
    "a write that does not fit": (
        lambda r, h: r.write("model.layers.1.output", r.apply("getitem", h, (..., slice(3)))),
        "a value of shape [1, 3, 3] does not fit the hook point's [1, 3, 48]",
    ),
    "a write of a value that is larger than its hook point": (
        lambda r, h: r.write("model.layers.1.output", r.apply("unsqueeze", h, 0)),
        "does not fit",
    ),
    "a write to what holds integers": (
        lambda r, h: r.write("model.embed_tokens.input[args.0]", 1),
        "holds integers and is read-only",
    ),
    "a write of complex numbers": (
        lambda r, h: r.write("model.layers.1.output", r.constant(torch.tensor([1j]))),
        "a complex64 value can't be written to float64",
    ),
    "a mask as an index": (
        lambda r, h: r.apply("getitem", h, r.apply("gt", h, 0)),
        "a boolean mask as index gives a result whose size depends on values",
    ),
    "a constant without its bytes": (
        lambda r, h: r.add(Constant(TensorSpec("float32", (4,), 7))),
        "tensor refers to buffer 7 of 0",
    ),
    "a number beyond every dtype": (lambda r, h: r.apply("add", h, 2**70), "add("),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_never_run_is_refused_at_admission(what: str, load_engine: LoadEngine) -> None:
    write, message = REFUSED[what]
    recorder = Recorder()

    write(recorder, recorder.read("model.layers.0.output"))

    assert message in refused(recorder, load_engine).message


def test_a_write_that_comes_too_late_names_both_lines(load_engine: LoadEngine) -> None:
    recorder = Recorder()
    late = recorder.read("model.layers.2.output")
    recorder.write("model.layers.0.output", recorder.apply("mul", late, 2.0))

    fault = refused(recorder, load_engine)

    assert fault.message == (
        "model.layers.0.output is written with a value that needs model.layers.2.output, which "
        "the model reaches only afterwards"
    )
    assert fault.hook == "model.layers.0.output"
    assert fault.other_source is not None
    assert [fault.source.line if fault.source else None, fault.other_source.line] == [3, 1]


def test_what_would_fill_the_memory_is_priced_without_allocating_it(
    load_engine: LoadEngine,
) -> None:
    recorder = Recorder()
    recorder.save(recorder.apply("zeros", (1 << 40,)))

    price = load_engine("llama").blueprint.check(recorder.graph(), LENGTHS, [])

    assert price.value_bytes == price.saved_bytes == 4 << 40
