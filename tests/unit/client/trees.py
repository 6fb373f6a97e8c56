"""A small model tree written by hand, a session that never connects, and a graph's meaning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from msgspec.structs import replace

from ndif_actor.engine import ops
from ndif_client import Session, Trace
from ndif_client.transport import Transport
from ndif_client.wire.catalogue import CATALOGUE
from ndif_client.wire.graph import (
    Apply,
    Constant,
    Graph,
    HookPoint,
    Parameter,
    ReadHook,
    Save,
    WriteHook,
)
from ndif_client.wire.messages import (
    ForwardInfo,
    HookInfo,
    ModelTree,
    ModuleInfo,
    OperationInfo,
    ParameterInfo,
)

NUM_LAYERS = 3
HIDDEN_SIZE = 6
VOCAB_SIZE = 11
TOKENS = 4

#: The orders of hook points, counted while the tree is built.
_HIDDEN = ["batch", "sequence", HIDDEN_SIZE]


class _Orders:
    def __init__(self) -> None:
        self.next = 0

    def hook(self, port: Any, leaf: str, shape: list[int | str], dtype: str) -> HookInfo:
        return HookInfo(port=port, leaf=leaf, shape=shape, dtype=dtype, order=self.moment())

    def moment(self) -> int:
        self.next += 1
        return self.next - 1


def make_tree() -> ModelTree:
    """Return the tree of a tiny language model, with the structures real ones have."""
    orders = _Orders()
    ids = ["batch", "sequence"]
    root_input = orders.hook("input", "kwargs.input_ids", list(ids), "int64")
    embed = ModuleInfo(
        name="embed_tokens",
        kind="Embedding",
        extra=f"{VOCAB_SIZE}, {HIDDEN_SIZE}",
        hooks=[
            orders.hook("input", "args.0", list(ids), "int64"),
            orders.hook("output", "", list(_HIDDEN), "float32"),
        ],
        parameters=[ParameterInfo("weight", [VOCAB_SIZE, HIDDEN_SIZE], "float32")],
    )
    layers = [_layer(orders, str(number)) for number in range(NUM_LAYERS)]
    norm = _plain(orders, "norm", "RMSNorm", f"({HIDDEN_SIZE},)", [HIDDEN_SIZE])
    body = ModuleInfo(
        name="model",
        kind="TinyModel",
        children=[embed, ModuleInfo(name="layers", kind="ModuleList", children=layers), norm],
    )
    head = _plain(orders, "lm_head", "Linear", "in_features=6", [VOCAB_SIZE, HIDDEN_SIZE])
    head = replace(head, forward=1)
    logits = orders.hook("output", "logits", ["batch", "sequence", VOCAB_SIZE], "float32")
    root = ModuleInfo(
        name="", kind="TinyForCausalLM", hooks=[root_input, logits], children=[body, head]
    )
    return ModelTree(
        id="tiny/model",
        kind="TinyForCausalLM",
        dtype="float32",
        device="cpu",
        tensor_parallel=1,
        packed=True,
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN_SIZE,
        vocab_size=VOCAB_SIZE,
        root=root,
        forwards=[
            _FORWARD,
            ForwardInfo(refusal="the forward of Linear is not code of transformers"),
        ],
    )


def _layer(orders: _Orders, name: str) -> ModuleInfo:
    layer_input = orders.hook("input", "args.0", list(_HIDDEN), "float32")
    hidden = orders.hook("input", "kwargs.hidden_states", list(_HIDDEN), "float32")
    rotary = [
        HookInfo(
            port="input",
            leaf=f"kwargs.rotary.{part}",
            shape=["batch", "sequence", 2],
            dtype="float32",
            order=hidden.order,
        )
        for part in range(2)
    ]
    attention = ModuleInfo(
        name="self_attn",
        kind="Attention",
        hooks=[hidden, *rotary, orders.hook("output", "0", list(_HIDDEN), "float32")],
    )
    pair_order = orders.moment()
    pair = [
        HookInfo(port="output", leaf=leaf, shape=list(_HIDDEN), dtype="float32", order=pair_order)
        for leaf in ("0", "1.0", "1.1")
    ]
    mixer = ModuleInfo(name="mixer", kind="Mixer", hooks=pair)
    mlp = _mlp(orders)
    layer_output = orders.hook("output", "", list(_HIDDEN), "float32")
    return ModuleInfo(
        name=name,
        kind="DecoderLayer",
        hooks=[layer_input, layer_output],
        children=[attention, mixer, mlp],
    )


#: The forward of every MLP: its second line has two operations, one of which shows no output.
_FORWARD = ForwardInfo(
    source="def forward(self, x):\n    return rotate(x, [x, x]) + self.up(x)\n",
    operations=[
        OperationInfo(
            name="rotate_0",
            line=1,
            hooks=[
                HookInfo(port=port, leaf=leaf, shape=list(_HIDDEN), dtype="float32", order=order)
                for port, leaf, order in (
                    ("input", "args.0", 1),
                    ("input", "args.1.0", 1),
                    ("input", "args.1.1", 1),
                    ("output", "", 2),
                )
            ],
        ),
        OperationInfo(
            name="add_0",
            line=1,
            hooks=[
                HookInfo(
                    port="input", leaf="args.0", call=call, shape=list(_HIDDEN), dtype="float32",
                    order=3 + call,
                )
                for call in range(2)
            ],
            withheld="the shards have yet to add it up",
        ),
    ],
)  # fmt: skip


def _mlp(orders: _Orders) -> ModuleInfo:
    """An MLP with four moments inside, between its input and its output."""
    entered = orders.hook("input", "args.0", list(_HIDDEN), "float32")
    for _ in range(4):
        orders.moment()
    left = orders.hook("output", "", list(_HIDDEN), "float32")
    return ModuleInfo(
        name="mlp",
        kind="MLP",
        hooks=[entered, left],
        forward=0,
        first_order=entered.order,
        parameters=[ParameterInfo("weight", [HIDDEN_SIZE, HIDDEN_SIZE], "float32")],
    )


def _plain(orders: _Orders, name: str, kind: str, extra: str, weight: list[int]) -> ModuleInfo:
    return ModuleInfo(
        name=name,
        kind=kind,
        extra=extra,
        hooks=[
            orders.hook("input", "args.0", list(_HIDDEN), "float32"),
            orders.hook("output", "", ["batch", "sequence", weight[0]], "float32"),
        ],
        parameters=[ParameterInfo("weight", weight, "float32")],
    )


def make_session() -> Session:
    """Return a session on the tree whose server does not exist; it can record."""
    return Session(Transport("http://127.0.0.1:9", None, 1.0, _nothing), make_tree(), "torch")


async def _nothing() -> str:
    return ""


@contextmanager
def scratch(session: Session, prompt: Any = "x") -> Iterator[Trace]:
    """Record a trace that need not save anything and will not be run."""
    trace = session.trace(prompt)
    trace._open()
    try:
        yield trace
    finally:
        trace._close(RuntimeError("only recorded"))


def finished_graph(trace: Trace) -> Graph:
    """Return the graph of a recorded trace, which is not to be run."""
    trace._recorder.failure = RuntimeError("only recorded")
    return trace._recorder.graph()


class Evaluation:
    """What a graph means: every node run in program order on given tensors.

    Attributes:
        hooks: the value at each hook point of each invoke, after all writes.
        saved: saved values by name.
    """

    def __init__(
        self,
        graph: Graph,
        hooks: dict[tuple[HookPoint, int], torch.Tensor],
        buffers: list[bytes],
        parameters: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self.hooks = {place: value.clone() for place, value in hooks.items()}
        self.saved: dict[str | None, Any] = {}
        self._buffers = buffers
        self._parameters = parameters or {}
        self._values: dict[int, Any] = {}
        for number, node in enumerate(graph.nodes):
            self._values[number] = self._run(node)

    def _run(self, node: Any) -> Any:
        values = self._values.__getitem__
        match node:
            case ReadHook(hook=hook, invoke=invoke):
                return self.hooks[hook, invoke].clone()
            case WriteHook(hook=hook, invoke=invoke, value=value):
                held = self.hooks[hook, invoke]
                new = torch.as_tensor(ops.resolve(value, values))
                self.hooks[hook, invoke] = new.to(held.dtype).expand(held.shape).clone()
                return None
            case Apply(op=op):
                args = [ops.resolve(argument, values) for argument in node.args]
                kwargs = {k: ops.resolve(v, values) for k, v in node.kwargs.items()}
                ops.bind(CATALOGUE[op], args, kwargs)
                return ops.apply(CATALOGUE[op], args, kwargs, torch.device("cpu"))
            case Constant(tensor=spec):
                raw = bytearray(self._buffers[spec.buffer])
                return torch.frombuffer(raw, dtype=getattr(torch, spec.dtype)).reshape(spec.shape)
            case Parameter(path=path):
                return self._parameters[path]
            case Save(value=value, name=name):
                self.saved[name] = self._values[value.node]
                return None
        raise AssertionError(node)


def evaluate(
    trace: Trace, hooks: dict[tuple[HookPoint, int], torch.Tensor], **parameters: torch.Tensor
) -> Evaluation:
    """Run the graph of a recorded trace."""
    paths = {name.replace("__", "."): value for name, value in parameters.items()}
    return Evaluation(finished_graph(trace), hooks, trace._recorder.buffers, paths)
