"""The engine on a CUDA device, against plain transformers on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from ndif_actor.engine.engine import Engine
from tests.conftest import LoadOracle, MakeModel
from tests.hostile.test_failures import FAILURES
from tests.hostile.test_neighbours import PROMPT, assert_same_bits, beside, harmless, poison
from tests.integration.engine.experiments import EXPERIMENTS
from tests.oracle import Oracle
from tests.requests import (
    Recorder,
    Request,
    assert_equal,
    every_family,
    landmarks,
    precision,
    run,
    run_and_save,
    saved,
    touchable,
)

DEVICE = "cuda"

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

Load = Callable[[str, torch.dtype], Engine]


@pytest.fixture(scope="module")
def load_on_device(model_folder: MakeModel) -> Load:
    """A function from family and dtype to an engine alone on the device."""

    @cache
    def load(family: str, dtype: torch.dtype) -> Engine:
        name = str(dtype).removeprefix("torch.")
        folder = model_folder(family, dtype)
        return Engine.load(folder, dtype=name, device=DEVICE, rank=0, world_size=1)

    return load


@every_family
def test_experiments_sharing_a_forward_equal_plain_hooks(
    family: str, load_on_device: Load, load_oracle: LoadOracle
) -> None:
    dtype, _ = precision(family)
    requests = [experiment(landmarks(family)) for experiment in EXPERIMENTS]

    together = run_and_save(load_on_device(family, dtype), requests)

    tolerance = 1e-8 if dtype == torch.float64 else 1e-3
    for request, values in zip(requests, together, strict=True):
        assert_equal(values, request.on(load_oracle(family, dtype)), tolerance)


def test_a_poisoned_neighbour_leaves_every_bit_of_the_others(load_on_device: Load) -> None:
    engine = load_on_device("llama", torch.bfloat16)
    points = touchable(engine)
    victims = [experiment(landmarks("llama")) for experiment in EXPERIMENTS[:10]]
    wanted = beside(engine, victims, harmless(points))

    for value in (float("nan"), float("inf"), 1e30):
        found = beside(engine, victims, poison(points, value))
        for values, expected in zip(found, wanted, strict=True):
            assert_same_bits(values, expected)


def test_no_failing_node_breaks_the_device(load_on_device: Load, load_oracle: LoadOracle) -> None:
    engine = load_on_device("llama", torch.float64)
    watcher = Recorder()
    watcher.save(watcher.read("output[logits]"))
    requests = [Request(watcher, [[PROMPT]])]
    for failure in FAILURES:
        recorder = Recorder()
        failure(recorder)
        requests.append(Request(recorder, [[PROMPT]]))

    for _ in range(2):
        results, buffers = run(engine, requests)

        assert all(result.fault is not None for result in results[1:])
        wanted = {1: load_oracle("llama").logits(PROMPT)}
        assert_equal(saved(results[0], buffers), wanted, 1e-8)


def test_smollm2_equals_plain_transformers(smollm2: Path) -> None:
    engine = Engine.load(smollm2, dtype="float32", device=DEVICE, rank=0, world_size=1)
    oracle = Oracle(smollm2, torch.float32)
    prompts = [[504, 1195, 4112, 22159, 314], [504, 3575, 282], [19556, 665, 17, 282]]
    recorder = Recorder()
    recorder.save(recorder.read("output[logits]"))

    together = run_and_save(engine, [Request(recorder, [[ids]]) for ids in prompts])

    for ids, values in zip(prompts, together, strict=True):
        assert_equal(values, {1: oracle.logits(ids)}, 1e-3)
