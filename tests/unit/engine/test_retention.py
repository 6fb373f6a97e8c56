"""What a backward is priced with is what autograd really keeps of the forward."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from ndif_actor.engine import adapter
from ndif_actor.engine.attention import IMPLEMENTATION, AttentionLayout, Segments, attending
from ndif_actor.engine.blueprint import Blueprint
from ndif_actor.engine.retention import measure
from tests.conftest import MakeModel
from tests.models import CONFIGS
from tests.requests import Recorder, every_family

EVERYTHING = 1 << 40


def kept(model: torch.nn.Module, tokens: int) -> int:
    """Count what autograd saves of a real forward on a packed row."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    counted: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            counted[storage.data_ptr()] = storage
        return tensor

    ids = torch.arange(tokens)[None]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(lambda _, args, out: out.detach().requires_grad_())
    with (
        attending(AttentionLayout([Segments(0, 1, tokens)])),
        saved_tensors_hooks(save, lambda tensor: tensor),
        torch.enable_grad(),
    ):
        adapter.run_packed(model, ids, ids)  # type: ignore[arg-type]
    handle.remove()
    return sum(storage.nbytes() for storage in counted.values())


@every_family
def test_prompts_are_priced_with_what_they_keep(family: str, model_folder: MakeModel) -> None:
    model = adapter.build_without_weights(CONFIGS[family](), torch.float32)
    retention = measure(model, Blueprint(model, 1).table)
    real = AutoModelForCausalLM.from_pretrained(
        model_folder(family, torch.float32), attn_implementation=IMPLEMENTATION
    ).requires_grad_(False)

    for tokens in (20, 60, 120):
        wanted, estimate = kept(real, tokens), retention.between(0, EVERYTHING, [tokens])
        assert estimate >= 0.9 * wanted
        if family != "qwen3_moe":  # without weights, each token is taken to visit every expert
            assert estimate <= 1.25 * wanted


def test_a_gradient_asked_for_late_keeps_less() -> None:
    model = adapter.build_without_weights(CONFIGS["llama"](), torch.float32)
    blueprint = Blueprint(model, 1)

    def value_bytes(layer: int) -> int:
        recorder = Recorder()
        hidden = recorder.read(f"model.layers.{layer}.output")
        loss = recorder.apply("sum", recorder.read("lm_head.output"))
        recorder.save(recorder.gradient(recorder.backward(loss), hidden))
        return blueprint.check(recorder.graph(), [[50]], []).value_bytes

    assert value_bytes(0) > 1.5 * value_bytes(2)


def test_what_is_not_differentiated_keeps_nothing() -> None:
    model = adapter.build_without_weights(CONFIGS["llama"](), torch.float32)
    recorder = Recorder()
    recorder.save(recorder.read("model.layers.0.output"))

    price = Blueprint(model, 1).check(recorder.graph(), [[50]], [])

    assert price.value_bytes == pytest.approx(50 * 48 * 4)
