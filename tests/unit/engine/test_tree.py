"""The model tree: what a client may browse without weights."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import torch

from ndif_actor.engine import adapter
from ndif_actor.engine.blueprint import Blueprint
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

    assert modules["model.norm"].hooks == [
        HookInfo(port="input", leaf="args.0", shape=["batch", "sequence", 48], dtype="bfloat16",
                 order=102),
        HookInfo(port="output", shape=["batch", "sequence", 48], dtype="bfloat16", order=103),
    ]  # fmt: skip
    assert modules["model.norm"].parameters == [ParameterInfo("weight", [48], "bfloat16")]


def test_the_tree_describes_the_model_as_a_whole() -> None:
    _, tree = make_tree("llama")

    assert (tree.id, tree.kind, tree.dtype) == ("tiny", "LlamaForCausalLM", "bfloat16")
    assert (tree.num_layers, tree.hidden_size, tree.vocab_size) == (3, 48, 300)
    assert (tree.packed, tree.unpackable, tree.tensor_parallel) == (True, None, 1)


def test_the_tree_travels_as_it_is() -> None:
    _, tree = make_tree("qwen3_moe")

    assert msgspec.json.decode(msgspec.json.encode(tree), type=ModelTree) == tree
