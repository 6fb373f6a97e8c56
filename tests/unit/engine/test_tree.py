"""The model tree: what a client may browse without weights."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
import torch

from ndif_actor.engine import adapter
from ndif_actor.engine.blueprint import Blueprint
from ndif_client.wire.graph import HookPoint
from ndif_client.wire.messages import HookInfo, ModelTree, ModuleInfo, ParameterInfo
from tests.models import CONFIGS


def make_tree(family: str) -> tuple[torch.nn.Module, ModelTree]:
    model = adapter.build_without_weights(CONFIGS[family](), torch.bfloat16)
    tree = Blueprint(model, 1).tree(model_id="tiny", device="cpu", unpackable=None)
    return model, tree


def walk(module: ModuleInfo, path: str = "") -> Iterator[tuple[str, ModuleInfo]]:
    yield path, module
    for child in module.children:
        yield from walk(child, f"{path}.{child.name}" if path else child.name)


def test_the_tree_has_the_modules_of_the_model_as_torch_prints_them() -> None:
    model, tree = make_tree("llama")

    modules = dict(walk(tree.root))

    assert list(modules) == [path for path, _ in model.named_modules()]
    for path, module in model.named_modules():
        assert modules[path].kind == type(module).__name__
        assert modules[path].extra == module.extra_repr()


def test_the_tree_has_the_parameters_of_the_model() -> None:
    model, tree = make_tree("gpt2")

    found = {
        f"{path}.{parameter.name}": parameter.shape
        for path, module in walk(tree.root)
        for parameter in module.parameters
    }

    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    assert found == {name: list(tensor.shape) for name, tensor in tensors}


def test_the_tree_says_what_can_be_touched_and_when() -> None:
    _, tree = make_tree("llama")
    modules = dict(walk(tree.root))
    first, last = (hook.order for hook in modules["model.norm"].hooks)

    assert modules["model.layers.2"].hooks[-1].order < first < last
    assert modules["model.norm"].hooks == [
        HookInfo(port="input", leaf="args.0", shape=["batch", "sequence", 48], dtype="bfloat16",
                 order=first),
        HookInfo(port="output", shape=["batch", "sequence", 48], dtype="bfloat16", order=last),
    ]  # fmt: skip
    assert modules["model.norm"].parameters == [ParameterInfo("weight", [48], "bfloat16")]


def test_the_tree_has_the_operations_of_each_forward_once() -> None:
    model = adapter.build_without_weights(CONFIGS["gemma3"](), torch.bfloat16)
    blueprint = Blueprint(model, 1)
    tree = blueprint.tree(model_id="tiny", device="cpu", unpackable=None)

    found = {}
    for path, module in walk(tree.root):
        assert module.forward is not None
        for operation in tree.forwards[module.forward].operations:
            for hook in operation.hooks:
                point = HookPoint(path, hook.port, hook.leaf, hook.call, operation.name)
                found[point] = module.first_order + hook.order

    sites = blueprint.table.sites
    assert found == {point: site.order for point, site in sites.items() if point.operation}
    modules = dict(walk(tree.root))
    attending = {modules[f"model.layers.{n}.self_attn"].forward for n in range(3)}
    assert len(attending) == 1
    assert len(tree.forwards) < 20


def test_the_tree_shows_the_source_of_a_forward_and_why_there_is_none() -> None:
    _, tree = make_tree("llama")
    modules = dict(walk(tree.root))

    mlp = tree.forwards[modules["model.layers.1.mlp"].forward or 0]
    linear = tree.forwards[modules["lm_head"].forward or 0]

    lines = mlp.source.splitlines()
    assert {lines[o.line].strip() for o in mlp.operations} == {
        "down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
    }
    assert [o.name for o in mlp.operations][-2:] == ["mul_0", "self_down_proj_0"]
    assert (linear.operations, linear.source) == ([], "")
    assert "Linear is not code of transformers" in linear.refusal


def test_the_tree_tells_what_the_shards_can_not_offer() -> None:
    model = adapter.build_without_weights(CONFIGS["llama"](), torch.bfloat16)
    blueprint = Blueprint(model, 1)
    point = HookPoint("model.layers.1.mlp", "output", operation="mul_0")

    blueprint.withhold({point: "it is a part of a sum"})

    tree = blueprint.tree(model_id="tiny", device="cpu", unpackable=None)
    numbers = [dict(walk(tree.root))[f"model.layers.{n}.mlp"].forward or 0 for n in range(2)]
    whole, lacking = (
        {o.name: o for o in tree.forwards[number].operations}["mul_0"] for number in numbers
    )
    assert {hook.port for hook in whole.hooks} == {"input", "output"}
    assert {hook.port for hook in lacking.hooks} == {"input"}
    assert lacking.withheld == "it is a part of a sum"
    with pytest.raises(LookupError, match="can't be touched: it is a part of a sum"):
        blueprint.table.find(point)


def test_the_tree_describes_the_model_as_a_whole() -> None:
    _, tree = make_tree("llama")

    assert (tree.id, tree.kind, tree.dtype) == ("tiny", "LlamaForCausalLM", "bfloat16")
    assert (tree.num_layers, tree.hidden_size, tree.vocab_size) == (3, 48, 300)
    assert (tree.packed, tree.unpackable, tree.tensor_parallel) == (True, None, 1)


def test_the_tree_travels_as_it_is() -> None:
    _, tree = make_tree("qwen3_moe")

    assert msgspec.json.decode(msgspec.json.encode(tree), type=ModelTree) == tree
