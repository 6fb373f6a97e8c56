"""What is known of a request before it runs: every shape and dtype, and its price."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from ndif_actor.engine import adapter, shapes
from ndif_actor.engine.blueprint import Blueprint
from ndif_actor.errors import RequestError
from ndif_client.wire.graph import Held, Keep
from ndif_client.wire.messages import HeldSpec
from ndif_client.wire.tensors import TensorSpec
from tests.models import CONFIGS
from tests.requests import Recorder

LENGTHS = [[5, 3], [4]]


@cache
def blueprint() -> Blueprint:
    model = adapter.build_without_weights(CONFIGS["llama"](), torch.float32)
    return Blueprint(model, world_size=1)


def inferred(recorder: Recorder) -> list[object]:
    program = blueprint().compile(recorder.graph(), len(LENGTHS))
    return [
        (str(value.dtype).removeprefix("torch."), tuple(value.shape))
        if isinstance(value, torch.Tensor)
        else value
        for value in shapes.infer(program, blueprint().model, LENGTHS).prefill.values()
    ]


def test_every_value_has_the_shape_it_will_have_when_it_runs() -> None:
    recorder = Recorder()
    recorder.read("model.layers.0.output", 0)
    recorder.read("lm_head.output", 1)
    recorder.read("input[kwargs.attention_mask]", 0)
    recorder.call("lm_head", recorder.parameter("model.norm.weight"))
    recorder.constant(torch.zeros(2, 0, dtype=torch.uint8))
    recorder.apply("argmax", recorder.apply("getitem", recorder.read("lm_head.output"), 0), -1)
    recorder.save(recorder.write("lm_head.output", 0.0, 1) and recorder.read("lm_head.output", 1))

    assert inferred(recorder) == [
        ("float32", (2, 5, 48)),
        ("float32", (1, 4, 300)),
        ("int64", (2, 5)),
        ("float32", (48,)),
        ("float32", (300,)),
        ("uint8", (2, 0)),
        ("float32", (2, 5, 300)),
        ("float32", (5, 300)),
        ("int64", (5,)),
        None,
        ("float32", (1, 4, 300)),
        None,
    ]


def test_a_value_is_broadcast_to_what_it_is_written_to() -> None:
    recorder = Recorder()
    row = recorder.constant(torch.zeros(48, dtype=torch.float64))
    recorder.write("model.layers.0.output", row)
    recorder.write("model.layers.0.output", True)
    recorder.write("model.layers.0.output", 7)

    assert inferred(recorder) == [("float64", (48,)), None, None, None]


def test_the_price_counts_tokens_bytes_and_work() -> None:
    recorder = Recorder()
    hidden = recorder.read("model.layers.0.output", 1)  # [1, 4, 48] float32
    weight = recorder.constant(torch.zeros(48, 10))
    product = recorder.apply("matmul", hidden, weight)  # [1, 4, 10]
    recorder.apply("neg", product)
    recorder.apply("reshape", product, (4, 10))
    recorder.save(recorder.apply("topk", product, 2))  # [1, 4, 2] float32 and int64

    price = blueprint().check(recorder.graph(), LENGTHS, list(map(memoryview, recorder.buffers)))

    assert price.tokens == 5 + 3 + 4
    assert price.saved_bytes == 8 * 4 + 8 * 8
    values = 4 * 48 * 4 + 48 * 10 * 4 + 3 * 40 * 4 + price.saved_bytes
    assert price.value_bytes == values
    assert price.flops == 2 * 4 * 10 * 48 + 40 + 40


def test_what_is_kept_costs_its_copy_and_what_is_held_costs_nothing() -> None:
    recorder = Recorder()
    held = recorder.add(Held("w"))  # [48, 10] float32
    product = recorder.apply("matmul", recorder.read("model.layers.0.output", 1), held)
    recorder.add(Keep(product, "product"))
    specs: dict[str, HeldSpec] = {"w": TensorSpec("float32", (48, 10))}

    price = blueprint().check(recorder.graph(), LENGTHS, [], held=specs)

    assert price.kept == {"product": TensorSpec("float32", (1, 4, 10))}
    assert price.value_bytes == 4 * 48 * 4 + 2 * 4 * 10 * 4


def test_nothing_is_computed_at_admission() -> None:
    recorder = Recorder()
    recorder.save(recorder.apply("matmul", *(recorder.apply("zeros", (1 << 20, 1 << 20)),) * 2))

    price = blueprint().check(recorder.graph(), LENGTHS, [])

    assert price.saved_bytes == 4 << 40


@pytest.mark.parametrize(
    ("nbytes", "message"),
    [(15, "has 16 bytes, its buffer has 15"), (None, "tensor refers to buffer 0 of 0")],
)
def test_a_constant_must_have_exactly_its_bytes(nbytes: int | None, message: str) -> None:
    recorder = Recorder()
    recorder.constant(torch.zeros(4))
    buffers = [] if nbytes is None else [memoryview(bytes(nbytes))]

    with pytest.raises(RequestError, match=message):
        blueprint().check(recorder.graph(), LENGTHS, buffers)


def test_parameters_and_modules_are_found_by_path() -> None:
    model = blueprint().model

    assert shapes.submodule(model, "") is model
    assert shapes.parameter(model, "model.norm.weight") is model.model.norm.weight
    assert shapes.parameter(model, "model.rotary_emb.inv_freq").shape == (6,)
    with pytest.raises(LookupError, match=r"has no module 'model.layers.9'"):
        shapes.submodule(model, "model.layers.9")
    with pytest.raises(LookupError, match="the model has no parameter 'weight'; it has none"):
        shapes.parameter(model, "weight")


def test_what_python_itself_could_reach_is_no_module_and_no_parameter() -> None:
    for path in ("forward", "config", "__class__", "model.layers.0.self_attn.config"):
        with pytest.raises(LookupError):
            shapes.submodule(blueprint().model, path)
        with pytest.raises(LookupError):
            shapes.parameter(blueprint().model, path)


def test_a_request_may_be_as_long_as_the_model_has_positions() -> None:
    assert blueprint().max_positions == 256
    assert blueprint().vocab_size == 300
