"""Models whose requests can't share a forward: they say why, and are served one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    RobertaConfig,
)

from ndif_actor.engine import adapter
from ndif_actor.engine.engine import Engine
from ndif_actor.errors import ModelError
from ndif_actor.messages import Dropped, Settle
from ndif_client.wire.graph import Held, Keep
from ndif_client.wire.messages import HeldSpec
from ndif_client.wire.tensors import TensorSpec
from tests.conftest import LoadEngine, LoadOracle
from tests.models import UNPACKABLE
from tests.oracle import Oracle
from tests.requests import EXACT, Recorder, Request, assert_equal, run, run_and_save

PROMPT = [5, 17, 99, 250, 3, 41, 8]

_SMALL = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

Save = Callable[[PreTrainedConfig], Path]


@pytest.fixture
def save_model(tmp_path: Path) -> Save:
    """Saves a random model of a configuration in float64 and returns its folder."""

    def save(config: PreTrainedConfig) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.2)
        model.save_pretrained(tmp_path)
        return tmp_path

    return save


def load(folder: Path) -> Engine:
    return Engine.load(folder, dtype="float64", device="cpu", rank=0, world_size=1)


def read_all(engine: Engine, invokes: list[list[list[int]]]) -> Request:
    recorder = Recorder()
    for invoke in range(len(invokes)):
        for point in engine.blueprint.table.sites:
            recorder.save(recorder.read(point, invoke))
    return Request(recorder, invokes)


every_unpackable = pytest.mark.parametrize("family", UNPACKABLE)


@every_unpackable
def test_a_family_with_an_attention_of_its_own_says_that_it_can_not_be_packed(
    family: str, load_engine: LoadEngine
) -> None:
    engine = load_engine(family)

    tree = engine.blueprint.tree(model_id="m", device="cpu", unpackable=engine.unpackable)

    assert not tree.packed
    assert tree.unpackable == engine.unpackable
    assert "can't be exchanged for one that keeps packed prompts apart" in (tree.unpackable or "")


@every_unpackable
def test_every_hook_point_of_an_unpackable_model_shows_what_a_plain_hook_sees(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    engine = load_engine(family)
    request = read_all(engine, [[PROMPT], [PROMPT[::-1], [9] * 7]])

    (values,) = run_and_save(engine, [request], "dense")

    assert_equal(values, request.on(load_oracle(family)), EXACT)


@every_unpackable
def test_values_cross_between_the_prompts_of_an_unpackable_model(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    block = {
        "mamba": "backbone.layers.1.output",
        "bloom": "transformer.h.1.output",
        "deberta": "deberta.encoder.layer.1.output",
    }[family]
    leaf = next(
        site.point
        for site in load_engine(family).blueprint.table.sites.values()
        if str(site.point).startswith(block)
    )
    recorder = Recorder()
    recorder.write(leaf, recorder.apply("mul", recorder.read(leaf, 0), 1.5), 1)
    recorder.save(recorder.read("output[logits]", 1))
    request = Request(recorder, [[PROMPT], [PROMPT[::-1]]])

    (values,) = run_and_save(load_engine(family), [request], "dense")

    assert_equal(values, request.on(load_oracle(family)), EXACT)


def test_padding_of_an_unpackable_model_reads_as_zeros_and_takes_no_writes(
    load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    recorder = Recorder()
    recorder.write("backbone.embeddings.output", float("nan"), 0)
    recorder.save(recorder.read("output[logits]", 1))
    hidden = recorder.read("backbone.layers.0.output", 1)
    recorder.save(hidden)
    request = Request(recorder, [[PROMPT], [PROMPT[:3], [7]]])

    (values,) = run_and_save(load_engine("mamba"), [request], "dense")

    assert_equal(values, request.on(load_oracle("mamba")), EXACT)
    assert torch.count_nonzero(values[4][1, :2]) == 0
    assert_equal({0: values[2][:1]}, {0: load_oracle("mamba").logits(PROMPT[:3])}, EXACT)


def test_prompts_of_unequal_length_are_refused_where_padding_would_change_the_results(
    load_engine: LoadEngine,
) -> None:
    engine = load_engine("bloom")  # whose padding becomes NaN in transformers itself
    recorder = Recorder()
    recorder.save(recorder.read("output[logits]"))

    results, _ = run(engine, [Request(recorder, [[PROMPT, PROMPT[:2]]])], "dense")

    assert results[0].fault is not None
    assert "must have the same number of tokens" in results[0].fault.message


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "qwen3_moe"])
def test_a_packable_model_gives_the_same_in_a_padded_batch(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    engine = load_engine(family)
    assert engine.unpackable is None
    request = read_all(engine, [[PROMPT, PROMPT[:2]], [[4, 4, 4]]])

    (values,) = run_and_save(engine, [request], "dense")

    assert_equal(values, request.on(load_oracle(family)), EXACT)


def test_an_attention_that_does_more_than_ours_is_noticed(save_model: Save) -> None:
    config = GptOssConfig(**_SMALL, num_local_experts=2, num_experts_per_tok=1)  # attention sinks
    folder = save_model(config)

    engine = load(folder)

    assert engine.unpackable == "a prompt in a packed row does not get the logits it gets alone"
    recorder = Recorder()
    recorder.save(recorder.read("output[logits]"))
    (values,) = run_and_save(engine, [Request(recorder, [[PROMPT]])], "dense")
    assert_equal(values, {1: Oracle(folder, torch.float64).logits(PROMPT)}, EXACT)


def test_a_model_that_numbers_its_positions_in_a_way_unknown_to_us_is_refused(
    save_model: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {k: v for k, v in _SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
    folder = save_model(RobertaConfig(**small, is_decoder=True))
    assert load(folder).unpackable is None
    monkeypatch.setattr(adapter, "_first_position", lambda model: 0)

    with pytest.raises(ModelError, match="numbers positions in a way of its own"):
        load(folder)


def test_packed_prompts_stay_below_the_length_at_which_all_frequencies_would_switch(
    save_model: Save,
) -> None:
    small = {k: v for k, v in _SMALL.items() if k != "head_dim"}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 6,
        "long_factor": [4.0] * 6,
    }
    config = Phi3Config(**small, rope_parameters=rope, original_max_position_embeddings=8)

    engine = load(save_model(config))

    assert engine.unpackable is None
    assert engine.blueprint.max_positions == 8


def test_a_model_whose_frequencies_depend_on_the_lengths_in_the_batch_is_refused(
    save_model: Save,
) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}

    with pytest.raises(ModelError, match="can't be traced without weights"):
        load(save_model(LlamaConfig(**_SMALL, rope_parameters=rope)))


@every_unpackable
def test_what_needs_no_forward_needs_no_prompt_and_values_can_be_kept(
    family: str, load_engine: LoadEngine
) -> None:
    engine = load_engine(family)
    keeper, user = Recorder(), Recorder()
    keeper.add(Keep(keeper.constant(torch.arange(3.0)), "w"))
    user.save(user.apply("mul", user.add(Held("w")), 2.0))

    run_and_save(engine, [Request(keeper, [])], "dense")
    engine.settle(Settle(["request-0"], []))
    held: dict[str, HeldSpec] = {"w": TensorSpec("float32", (3,))}
    (values,) = run_and_save(engine, [Request(user, [], held=held)], "dense")

    assert torch.equal(values[2], torch.tensor([0.0, 2.0, 4.0]))
    engine.settle(Settle([], [Dropped("scope")]))
