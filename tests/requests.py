"""Building graphs in few words, running them on an engine, and comparing with the oracle."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from msgspec.structs import replace

from ndif_actor.engine.engine import Engine, Tell
from ndif_actor.messages import Group, GroupResult, Layout, RunPass
from ndif_client.wire.graph import (
    PREFILL,
    Apply,
    Argument,
    Backward,
    CallModule,
    Choose,
    Condition,
    Constant,
    Dots,
    Graph,
    HookPoint,
    Items,
    Log,
    Node,
    Parameter,
    Port,
    ReadGradient,
    ReadHook,
    Ref,
    Save,
    Slice,
    Source,
    Steps,
    WriteGradient,
    WriteHook,
)
from ndif_client.wire.messages import HeldSpec
from ndif_client.wire.tensors import TensorSpec, export_array, import_array
from tests.models import CONFIGS, ENCODER_DECODERS, ENCODERS, UNPACKABLE
from tests.oracle import Invokes, NeverRan, Oracle, Saved

#: Largest absolute error in float64.
EXACT = 1e-10

_APART = {*UNPACKABLE, *ENCODERS, *ENCODER_DECODERS, "llama6", "qwen3_6"}
FAMILIES = [family for family in CONFIGS if family not in _APART]

every_family = pytest.mark.parametrize("family", FAMILIES)


class Landmarks(NamedTuple):
    """Where the parts of a family are, all in one block where there are several."""

    block: str
    attention: str
    projection: str
    mlp: str
    next_block: str
    norm: str
    lm_head: str = "lm_head"


LLAMA = Landmarks(
    "model.layers.1",
    "model.layers.1.self_attn",
    "model.layers.1.self_attn.o_proj",
    "model.layers.1.mlp",
    "model.layers.2",
    "model.norm",
)
GPT2 = Landmarks(
    "transformer.h.1",
    "transformer.h.1.attn",
    "transformer.h.1.attn.c_proj",
    "transformer.h.1.mlp",
    "transformer.h.2",
    "transformer.ln_f",
)


GPT_NEOX = Landmarks(
    "gpt_neox.layers.1",
    "gpt_neox.layers.1.attention",
    "gpt_neox.layers.1.attention.dense",
    "gpt_neox.layers.1.mlp",
    "gpt_neox.layers.2",
    "gpt_neox.final_layer_norm",
    "lm_head",
)
BERT = Landmarks(
    "bert.encoder.layer.1",
    "bert.encoder.layer.1.attention",
    "bert.encoder.layer.1.attention.output.dense",
    "bert.encoder.layer.1.attention.output.dropout",
    "bert.encoder.layer.2",
    "cls.predictions.transform.dense",
    "cls.predictions.decoder",
)
ROBERTA = Landmarks(
    *(name.replace("bert.", "roberta.", 1) for name in BERT[:5]), "lm_head.dense", "lm_head.decoder"
)
MODERNBERT = Landmarks(
    "model.layers.1",
    "model.layers.1.attn",
    "model.layers.1.attn.Wo",
    "model.layers.1.mlp",
    "model.layers.2",
    "model.final_norm",
    "decoder",
)
_LANDMARKS = {
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "bert": BERT,
    "roberta": ROBERTA,
    "modernbert": MODERNBERT,
}


def precision(family: str, *, padded: bool = True) -> tuple[torch.dtype, float]:
    """Return in which dtype to compare a family with the oracle, and how closely.

    `padded` says whether the oracle must pad: in float64, the padding of Gemma 2 becomes NaN in
    transformers itself.
    """
    if family == "gemma2" and padded:
        return torch.float32, 1e-4
    return torch.float64, EXACT


def landmarks(family: str) -> Landmarks:
    """Return where the parts of a family of `tests.models` are."""
    return _LANDMARKS.get(family, LLAMA)


class Recorder:
    """A graph while it is being written; each method adds a node and returns its value."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.buffers: list[bytes] = []
        self.steps: list[Steps] = []
        self.conditions: list[Condition] = []
        self.under: list[int] = []
        self.seed = 0
        self._current = PREFILL
        self._under = 0

    @contextmanager
    def when(self, condition: Ref, *, negated: bool = False) -> Iterator[None]:
        """Within the block, nodes run only if a value is not 0 (or is)."""
        outer = self._under
        self.conditions.append(Condition(condition.node, negated, outer))
        self._under = len(self.conditions)
        yield
        self._under = outer

    @contextmanager
    def during(self, start: int, stop: int | None = None, stride: int = 1) -> Iterator[None]:
        """Within the block, nodes run at these steps of a generation."""
        self._current = Steps(start, stop, stride)
        yield
        self._current = PREFILL

    def add(self, node: Node) -> Ref:
        self.nodes.append(node)
        self.steps.append(self._current)
        self.under.append(self._under)
        return Ref(len(self.nodes) - 1)

    def read(self, hook: str | HookPoint, invoke: int = 0) -> Ref:
        return self.add(ReadHook(point(hook), invoke))

    def write(self, hook: str | HookPoint, value: Argument, invoke: int = 0) -> Ref:
        return self.add(WriteHook(point(hook), value, invoke))

    def apply(self, op: str, *args: Any, **kwargs: Any) -> Ref:
        named = {name: argument(value) for name, value in kwargs.items()}
        return self.add(Apply(op, [argument(arg) for arg in args], named))

    def call(self, path: str, *args: Any, **kwargs: Any) -> Ref:
        return self.add(CallModule(path, list(args), kwargs))

    def parameter(self, path: str) -> Ref:
        return self.add(Parameter(path))

    def constant(self, tensor: torch.Tensor) -> Ref:
        dtype, shape, raw = export_array(tensor)
        self.buffers.append(bytes(raw))
        return self.add(Constant(TensorSpec(dtype, shape, len(self.buffers) - 1)))  # type: ignore[arg-type]

    def backward(self, loss: Ref, gradient: Ref | None = None) -> Ref:
        return self.add(Backward(loss, gradient))

    def gradient(self, backward: Ref, of: Ref) -> Ref:
        return self.add(ReadGradient(backward.node, of))

    def write_gradient(self, backward: Ref, of: Ref, value: Argument) -> Ref:
        return self.add(WriteGradient(backward.node, of, value))

    def choose(self, condition: Ref, then: Ref, otherwise: Ref) -> Ref:
        return self.add(Choose(condition, then, otherwise))

    def save(self, value: Ref, name: str | None = None) -> Ref:
        return self.add(Save(value, name))

    def log(self, *items: Ref | str) -> Ref:
        return self.add(Log(list(items)))

    def graph(self) -> Graph:
        """Return the graph; node n was written in line n + 1 of "experiment.py"."""
        lines = range(len(self.nodes))
        sources = [Source("experiment.py", n + 1, f"line {n + 1}") for n in lines]
        blocks = list(dict.fromkeys(self.steps))
        during = [blocks.index(steps) for steps in self.steps]
        graph = Graph(list(self.nodes), sources, list(lines), seed=self.seed)
        if self.conditions:
            graph = replace(graph, conditions=self.conditions, under=self.under)
        if blocks in ([], [PREFILL]):
            return graph
        return replace(graph, steps=blocks, during=during)


def point(hook: str | HookPoint, call: int = 0) -> HookPoint:
    """Return the hook point written as "path.output", "path.input[args.0]" or "output[logits]".

    That of an operation is written as "path.source.add_0.output".
    """
    if isinstance(hook, HookPoint):
        return hook
    place, _, leaf = hook.removesuffix("]").partition("[")
    path, _, port = place.rpartition(".")
    path, _, operation = path.partition("source.")
    known = msgspec.convert(port, Port)
    return HookPoint(path.removesuffix("."), known, leaf, call, operation)


def argument(value: Any) -> Argument:
    """Turn Python's own slices, tuples and `...` into a graph's arguments."""
    match value:
        case slice(start=start, stop=stop, step=step):
            return Slice(start, stop, step)
        case tuple() | list():
            return Items([argument(item) for item in value])
        case _ if value is ...:
            return Dots()
        case _:
            known: Argument = value
            return known


class Request:
    """A graph and the prompts it runs on; equal `sharing` lets equal prompts share their rows.

    `held` says what the held values are that it uses, `decoder` what a decoder reads beside each
    prompt.
    """

    def __init__(
        self,
        recorder: Recorder,
        invokes: Invokes,
        sharing: int = 0,
        held: dict[str, HeldSpec] | None = None,
        decoder: Invokes = (),
    ) -> None:
        self.recorder = recorder
        self.decoder = [[list(ids) for ids in prompts] for prompts in decoder]
        self.held = held or {}
        self.sharing = sharing
        self.invokes = [[list(ids) for ids in prompts] for prompts in invokes]

    def group(self, number: int, first_buffer: int) -> Group:
        """Return it as a group of a pass whose buffers hold its own from `first_buffer` on."""
        own = self.recorder.graph()
        nodes = moved_constants(own.nodes, first_buffer)
        return Group(
            request=f"request-{number}",
            invokes=self.invokes,
            graph=replace(own, nodes=nodes),
            sharing=self.sharing,
            decoder=self.decoder,
            scope="scope",
            held=self.held,
        )

    def on(self, oracle: Oracle) -> Saved:
        """Return what the oracle saves."""
        return oracle.run(self.invokes, self.recorder.graph(), self.recorder.buffers)


def read_all(points: Sequence[HookPoint], invokes: Invokes) -> Request:
    """A request that saves what it sees at these hook points, in each of its invokes."""
    recorder = Recorder()
    for invoke in range(len(invokes)):
        for hook in points:
            recorder.save(recorder.read(hook, invoke))
    return Request(recorder, invokes)


def differentiated(points: Sequence[HookPoint], ids: Sequence[int], loss_at: str) -> Request:
    """A request that saves gradients, at these hook points, of a number made at another one."""
    recorder = Recorder()
    values = [recorder.read(hook) for hook in points]
    output = recorder.read(loss_at)
    loss = recorder.apply("sum", recorder.apply("sin", output))
    backward = recorder.backward(loss)
    for value in values:
        recorder.save(recorder.gradient(backward, value))
    return Request(recorder, [[ids]])


def flipped(hook: HookPoint, ids: Sequence[int]) -> Request:
    """A request that turns the tokens at a hook point round, and saves the logits."""
    recorder = Recorder()
    before = recorder.read(hook)
    recorder.write(hook, recorder.apply("mul", recorder.apply("flip", before, (1,)), 0.7))
    recorder.save(recorder.read("output[logits]"))
    return Request(recorder, [[ids]])


def touchable(engine: Engine) -> list[HookPoint]:
    """The hook points of the second block, and of what lies around the blocks, to be written."""
    return [
        site.point
        for site in engine.blueprint.table.sites.values()
        if site.dtype.is_floating_point and not re.search(r"\.[02]($|\.)", site.point.path)
    ]


def moved_constants(nodes: Sequence[Node], first_buffer: int) -> list[Node]:
    """Let constants point to buffers that begin with number `first_buffer`."""
    return [_moved(node, first_buffer) for node in nodes]


def _moved(node: Node, first_buffer: int) -> Node:
    if not isinstance(node, Constant):
        return node
    spec = node.tensor
    return Constant(TensorSpec(spec.dtype, spec.shape, spec.buffer + first_buffer))


def allocate(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


def run(
    engine: Engine,
    requests: Sequence[Request],
    layout: Layout = "packed",
    tell: Tell = lambda line: None,
) -> tuple[list[GroupResult], list[memoryview]]:
    """Run one pass; return its results in the order of the requests, and their buffers."""
    groups, buffers = [], []
    for number, request in enumerate(requests):
        groups.append(request.group(number, len(buffers)))
        buffers += [memoryview(raw) for raw in request.recorder.buffers]
    message = RunPass(sequence=1, layout=layout, groups=groups)
    results, out = engine.run_pass(message, buffers, allocate, tell)
    by_name = {result.request: result for result in results}
    return [by_name[group.request] for group in groups if group.request in by_name], out


def saved(result: GroupResult, buffers: Sequence[memoryview]) -> Saved:
    """Return what a group saved, by the number of the `Save` node."""
    assert result.fault is None, result.fault
    values: Saved = {
        item.node: import_array(item.tensor, buffers[item.tensor.buffer], "torch")
        for item in result.tensors
    }
    for group in result.tuples:
        values[group.node] = tuple(
            import_array(spec, buffers[spec.buffer], "torch") for spec in group.items
        )
    return values


def run_and_save(
    engine: Engine, requests: Sequence[Request], layout: Layout = "packed"
) -> list[Saved]:
    """Run one pass in which nothing fails; return what each request saved."""
    results, buffers = run(engine, requests, layout)
    assert len(results) == len(requests)
    return [saved(result, buffers) for result in results]


def assert_same_gradients(
    requests: Sequence[Request],
    results: Sequence[GroupResult],
    buffers: Sequence[memoryview],
    oracle: Oracle,
    tolerance: float,
) -> None:
    """Compare what each request saved; those whose gradients don't exist are to be refused."""
    refused = 0
    for request, result in zip(requests, results, strict=True):
        try:
            wanted = request.on(oracle)
        except NeverRan:
            refused += 1
            assert result.fault is not None
            assert "does not depend on" in result.fault.message
        else:
            assert_equal(saved(result, buffers), wanted, tolerance)
    # Of what enters the rotary embedding, for one, only the dtype is used.
    assert refused < len(requests) / 5


def assert_equal(values: Saved, wanted: Saved, tolerance: float) -> None:
    """Compare saved values: same nodes, shapes and dtypes, and within `tolerance` absolute."""
    assert values.keys() == wanted.keys()
    for node, value in values.items():
        try:
            torch.testing.assert_close(value, wanted[node], rtol=0, atol=tolerance, equal_nan=True)
        except AssertionError as error:
            error.add_note(f"of node {node}")
            raise
