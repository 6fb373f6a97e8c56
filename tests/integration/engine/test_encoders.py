"""Encoders, in which every token attends to all: in a shared forward, and they do not generate."""

from __future__ import annotations

import pytest

from ndif_actor.engine.names import standard_names
from ndif_client.wire.graph import HookPoint
from tests.conftest import LoadEngine, LoadOracle
from tests.integration.engine.experiments import EIFFEL, EXPERIMENTS, SHORT
from tests.requests import (
    EXACT,
    Recorder,
    Request,
    assert_equal,
    differentiated,
    flipped,
    landmarks,
    point,
    read_all,
    run_and_save,
    touchable,
)

every_encoder = pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])

#: Longer than ModernBERT's window on both sides.
LONG = [*EIFFEL, *reversed(EIFFEL)]


@every_encoder
def test_encoders_share_a_forward_and_have_no_kv_cache(
    family: str, load_engine: LoadEngine
) -> None:
    engine = load_engine(family)

    assert engine.unpackable is None
    assert engine.blueprint.table.layers is not None
    assert engine.cache is None


def test_positions_that_padding_takes_are_no_positions_of_a_prompt(
    load_engine: LoadEngine,
) -> None:
    assert load_engine("bert").blueprint.max_positions == 256
    assert load_engine("roberta").blueprint.max_positions == 254


@every_encoder
def test_in_one_forward_experiments_on_an_encoder_equal_plain_hooks_alone(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    requests = [experiment(landmarks(family)) for experiment in EXPERIMENTS]

    together = run_and_save(load_engine(family), requests)

    for request, values in zip(requests, together, strict=True):
        assert_equal(values, request.on(load_oracle(family)), EXACT)


@every_encoder
def test_every_hook_point_of_an_encoder_shows_what_a_plain_hook_sees(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    points = list(load_engine(family).blueprint.table.sites)
    request = read_all(points, [[LONG], [LONG[::-1], [9] * len(LONG)]])

    (values, _) = run_and_save(load_engine(family), [request, read_all(points, [[SHORT]])])

    assert_equal(values, request.on(load_oracle(family)), EXACT)


@every_encoder
def test_a_write_to_any_hook_point_changes_an_encoder_as_a_plain_hook_would(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    engine = load_engine(family)
    requests = [flipped(hook, LONG) for hook in touchable(engine) if not hook.operation]

    values = run_and_save(engine, requests)

    for request, saved in zip(requests, values, strict=True):
        assert_equal(saved, request.on(load_oracle(family)), EXACT)


@every_encoder
def test_gradients_in_an_encoder_equal_those_of_plain_hooks(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    at = landmarks(family)
    points = [f"{at.block}.output", f"{at.projection}.input[args.0]", f"{at.block}.input[args.0]"]
    requests = [
        differentiated([point(name) for name in points], ids, "output[logits]")
        for ids in (LONG, SHORT)
    ]

    together = run_and_save(load_engine(family), requests)

    for request, values in zip(requests, together, strict=True):
        assert_equal(values, request.on(load_oracle(family)), EXACT)


@every_encoder
def test_the_pattern_of_an_encoder_looks_ahead_too(family: str, load_engine: LoadEngine) -> None:
    engine = load_engine(family)
    path = sorted(engine.blueprint.table.attention)[0]
    recorder = Recorder()
    recorder.save(recorder.read(HookPoint(path, "pattern")))

    (values,) = run_and_save(engine, [Request(recorder, [[EIFFEL[:3]]])])

    assert (values[1] > 0).all()


@every_encoder
def test_the_standard_names_of_an_encoder_lead_to_its_modules(
    family: str, load_engine: LoadEngine
) -> None:
    blueprint = load_engine(family).blueprint
    names = standard_names(blueprint.model, blueprint.table)
    at = landmarks(family)

    root = names.aliases[""]
    assert f"{root['layers']}.1" == at.block
    assert root["unembed"] == at.lm_head
    assert names.aliases[at.block]["attn"] in ("attention.self", "attn")
    assert at.block in names.residual
