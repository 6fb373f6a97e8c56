"""Every hook point of every family: what it shows, and what a write to it does to the model."""

from __future__ import annotations

import torch

from ndif_client.wire.graph import HookPoint
from tests.conftest import LoadEngine, LoadOracle
from tests.requests import (
    EXACT,
    Recorder,
    Request,
    assert_equal,
    every_family,
    flipped,
    precision,
    read_all,
    run_and_save,
    touchable,
)

#: Longer than the windows of the families that have one.
PROMPT = [5, 17, 99, 250, 3, 41, 8]


@every_family
def test_every_hook_point_shows_what_a_plain_hook_sees(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    engine = load_engine(family)
    request = read_all(list(engine.blueprint.table.sites), [[PROMPT]])

    assert_equal(run_and_save(engine, [request])[0], request.on(load_oracle(family)), EXACT)


@every_family
def test_equally_long_prompts_of_one_invoke_are_stacked(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    engine = load_engine(family)
    request = read_all(list(engine.blueprint.table.sites), [[PROMPT, PROMPT[::-1], [9] * 7]])

    assert_equal(run_and_save(engine, [request])[0], request.on(load_oracle(family)), EXACT)


@every_family
def test_prompts_of_unequal_length_are_padded_with_zeros_on_the_left(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    dtype, tolerance = precision(family)
    engine = load_engine(family, dtype)
    points = list(engine.blueprint.table.sites)
    request = read_all(points, [[PROMPT, PROMPT[:2]], [[4, 4, 4]], [[7], PROMPT, [1, 2]]])

    values = run_and_save(engine, [request])[0]

    assert_equal(values, request.on(load_oracle(family, dtype)), tolerance)
    logits = values[2 * points.index(HookPoint("", "output", "logits")) + 1]
    assert logits.shape[:2] == (2, 7)
    assert torch.count_nonzero(logits[1, :5]) == 0


@every_family
def test_a_prompt_gets_the_logits_it_gets_without_any_hook(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    prompts = [PROMPT, [8], [3, 1], PROMPT[:4], [200, 100, 50]]
    recorder = Recorder()
    recorder.save(recorder.read("output[logits]"))

    values = run_and_save(load_engine(family), [Request(recorder, [[p]]) for p in prompts])

    for prompt, saved in zip(prompts, values, strict=True):
        assert_equal(saved, {1: load_oracle(family).logits(prompt)}, EXACT)


@every_family
def test_a_write_to_any_hook_point_changes_the_model_as_a_plain_hook_would(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    engine, oracle = load_engine(family), load_oracle(family)
    points = touchable(engine)

    # All in one forward: each write must change its own request and no other.
    requests = [flipped(point, PROMPT) for point in points]
    together = run_and_save(engine, requests)

    untouched = oracle.logits(PROMPT)
    idle = set()
    for point, request, values in zip(points, requests, together, strict=True):
        wanted = request.on(oracle)
        assert_equal(values, wanted, EXACT)
        if (wanted[5] - untouched).abs().max() < 1e-6:
            idle.add(str(point))
    # The model itself makes no use of these.
    modules = {place.partition(".")[2] for place in idle if "source." not in place}
    assert modules <= {"rotary_emb.input[args.0]", "layers.1.mlp.gate.output[0]"}
    assert len(idle) < len(points) / 10


def test_the_hook_points_of_a_llama_block_are_those_of_its_modules(load_engine: LoadEngine) -> None:
    sites = load_engine("llama").blueprint.table.sites.values()

    found = [
        f"{site.point} {' '.join(map(str, site.shape))}"
        for site in sites
        if site.point.path.startswith("model.layers.0.")
        and site.point.port == "output"
        and not site.point.operation
    ]

    assert [line.removeprefix("model.layers.0.") for line in found] == [
        "input_layernorm.output batch sequence 48",
        "self_attn.q_proj.output batch sequence 48",
        "self_attn.k_proj.output batch sequence 24",
        "self_attn.v_proj.output batch sequence 24",
        "self_attn.o_proj.output batch sequence 48",
        "self_attn.output[0] batch sequence 48",
        "post_attention_layernorm.output batch sequence 48",
        "mlp.gate_proj.output batch sequence 80",
        "mlp.act_fn.output batch sequence 80",
        "mlp.up_proj.output batch sequence 80",
        "mlp.down_proj.output batch sequence 48",
        "mlp.output batch sequence 48",
    ]
