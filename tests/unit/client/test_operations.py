"""The operations inside of a forward as a client sees, reads and writes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ndif_client import Session, Trace
from ndif_client.errors import GraphError, OrderError, UnknownNameError
from ndif_client.wire.graph import HookPoint, ReadHook, WriteHook
from tests.unit.client.trees import evaluate, finished_graph, scratch

MLP = "model.layers.1.mlp"


@pytest.fixture
def mlp(model: Any) -> Any:
    return model.model.layers[1].mlp


def _touched(trace: Trace, kind: type) -> list[str]:
    return [str(node.hook) for node in finished_graph(trace).nodes if isinstance(node, kind)]


def test_the_source_is_shown_with_the_names_beside_its_lines(mlp: Any) -> None:
    assert repr(mlp.source) == (
        "              1 def forward(self, x):\n"
        "rotate_0 ->   2     return rotate(x, [x, x]) + self.up(x)\n"
        "add_0    ->   +"
    )


def test_operations_are_listed_and_found_by_name(mlp: Any) -> None:
    assert list(mlp.source) == ["rotate_0", "add_0"]
    assert set(dir(mlp.source)) == {"rotate_0", "add_0"}
    assert len(mlp.source) == 2
    assert "add_0" in mlp.source
    assert "source" in dir(mlp)
    assert repr(mlp.source["rotate_0"]).splitlines() == [
        f"{MLP}.source.rotate_0 (line 2 of the forward):",
        "  input[args.0]: float32[batch, sequence, 6]",
        "  input[args.1.0]: float32[batch, sequence, 6]",
        "  input[args.1.1]: float32[batch, sequence, 6]",
        "  output: float32[batch, sequence, 6]",
    ]


def test_an_operation_is_read_like_a_module(session: Session, mlp: Any) -> None:
    with scratch(session) as trace:
        _ = mlp.source.rotate_0.output
        _ = mlp.source.rotate_0.input
        _ = mlp.source.rotate_0.inputs.args[1][0]
        _ = mlp.source.add_0.at_call(1).input
        with pytest.raises(GraphError, match=r"called 2 time\(s\)"):
            mlp.source.add_0.at_call(2)

    assert _touched(trace, ReadHook) == [
        f"{MLP}.source.rotate_0.output",
        f"{MLP}.source.rotate_0.input[args.0]",
        f"{MLP}.source.rotate_0.input[args.1.0]",
        f"{MLP}.source.add_0.input[args.0] (call 1)",
    ]


def test_an_operation_is_written_like_a_module(session: Session, mlp: Any) -> None:
    with scratch(session) as trace:
        mlp.source.rotate_0.output[:, -1] = 0
        mlp.source.rotate_0.inputs.args[1][0] = 1.5
        mlp.source.add_0.input += 1
        mlp.source.rotate_0.output = 2
    hooks = {
        (node.hook, 0): torch.ones(1, 2, 6)
        for node in finished_graph(trace).nodes
        if isinstance(node, ReadHook | WriteHook)
    }
    held = evaluate(trace, hooks).hooks

    output = HookPoint(MLP, "output", operation="rotate_0")
    added = HookPoint(MLP, "input", "args.0", operation="add_0")
    assert _touched(trace, WriteHook) == [
        f"{MLP}.source.rotate_0.output",
        f"{MLP}.source.rotate_0.input[args.1.0]",
        f"{MLP}.source.add_0.input[args.0]",
        f"{MLP}.source.rotate_0.output",
    ]
    assert held[output, 0].unique().tolist() == [2]
    assert held[added, 0].unique().tolist() == [2]


def test_operations_have_their_place_in_the_order_of_the_forward(
    session: Session, model: Any, mlp: Any
) -> None:
    with scratch(session):
        inside = mlp.source.rotate_0.output
        mlp.source.add_0.input = inside
        mlp.output = inside
        model.model.layers[2].mlp.source.rotate_0.input = inside
        with pytest.raises(OrderError, match=f"needs {MLP}.source.rotate_0.output"):
            mlp.input = inside
        with pytest.raises(OrderError, match=r"model\.layers\.0\.mlp\.source\.add_0"):
            model.model.layers[0].mlp.source.add_0.input = inside


def test_what_there_is_not_is_refused_with_what_there_is(
    session: Session, model: Any, mlp: Any
) -> None:
    with scratch(session):
        with pytest.raises(UnknownNameError, match="'rotate_1'; did you mean 'rotate_0'"):
            _ = mlp.source.rotate_1
        with pytest.raises(GraphError, match="the shards have yet to add it up"):
            _ = mlp.source.add_0.output
        with pytest.raises(GraphError, match="Linear is not code of transformers"):
            _ = model.lm_head.source
        with pytest.raises(GraphError, match="offers no operations"):
            _ = model.model.layers[0].self_attn.source
        with pytest.raises(GraphError, match=r"rotate_0\.output = value"):
            mlp.source.rotate_0 = 1
        with pytest.raises(UnknownNameError, match="it has input and output"):
            mlp.source.rotate_0.value = 1
        with pytest.raises(GraphError, match="can't be assigned"):
            mlp.source = 1
        with pytest.raises(GraphError, match="write one of the inputs"):
            mlp.source.rotate_0.inputs = 1
