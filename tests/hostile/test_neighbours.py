"""Nothing that one request does can be seen in another's result."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ndif_actor.engine.engine import Engine
from ndif_client.wire.graph import HookPoint
from tests.conftest import LoadEngine
from tests.integration.engine.experiments import EXPERIMENTS
from tests.oracle import Saved
from tests.requests import FAMILIES, Recorder, Request, landmarks, run, saved, touchable

#: As long as the prompts of the experiments, so that every matrix product has the same shape.
PROMPT = [11, 22, 33, 44, 55, 66, 77]

POISONS = (float("nan"), float("inf"), float("-inf"), 1e30, 0.0)

#: In these, how many rows each expert multiplies depends on the neighbours, and rounding with it.
MIXTURES = ("qwen3_moe",)


def neighbour(points: Sequence[HookPoint], value: float | None, sharing: int = 1) -> Request:
    """Write `value` at all these hook points, or, where there is none, what was there before."""
    recorder = Recorder()
    for point in points:
        recorder.write(point, recorder.read(point) if value is None else value)
    recorder.save(recorder.read("output[logits]"))
    return Request(recorder, [[PROMPT]], sharing)


def harmless(points: Sequence[HookPoint]) -> Request:
    return neighbour(points, None)


def poison(points: Sequence[HookPoint], value: float) -> Request:
    return neighbour(points, value)


def beside(engine: Engine, victims: Sequence[Request], neighbour: Request) -> list[Saved]:
    """Return what the victims save in a forward they share with a neighbour."""
    results, buffers = run(engine, [neighbour, *victims, neighbour])
    return [saved(result, buffers) for result in results[1:-1]]


def assert_same_bits(values: Saved, wanted: Saved) -> None:
    torch.testing.assert_close(values, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in MIXTURES])
def test_a_poisoned_neighbour_leaves_every_bit_of_the_others_as_a_harmless_one_does(
    family: str, dtype: torch.dtype, load_engine: LoadEngine
) -> None:
    engine = load_engine(family, dtype)
    points = touchable(engine)
    victims = [
        experiment(landmarks(family))
        for experiment in EXPERIMENTS
        if dtype == torch.float64 or experiment.__name__ != "compute_before_the_forward"
    ]
    wanted = beside(engine, victims, harmless(points))

    for value in POISONS:
        for values, expected in zip(
            beside(engine, victims, poison(points, value)), wanted, strict=True
        ):
            assert_same_bits(values, expected)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_poisoned_neighbour_changes_only_the_rounding_of_a_mixture_of_experts(
    family: str, load_engine: LoadEngine
) -> None:
    engine = load_engine(family)
    points = touchable(engine)
    victims = [experiment(landmarks(family)) for experiment in EXPERIMENTS]
    wanted = beside(engine, victims, harmless(points))

    for value in POISONS:
        found = beside(engine, victims, poison(points, value))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_one_poisoned_hook_point_at_a_time_leaves_the_others_alone(load_engine: LoadEngine) -> None:
    engine = load_engine("qwen3")
    victims = [experiment(landmarks("qwen3")) for experiment in EXPERIMENTS[:4]]
    points = touchable(engine)

    for point in points:
        wanted = beside(engine, victims, harmless([point]))
        found = beside(engine, victims, poison([point], float("nan")))
        for values, expected in zip(found, wanted, strict=True):
            assert_same_bits(values, expected)


def test_the_order_of_the_requests_does_not_matter(load_engine: LoadEngine) -> None:
    engine = load_engine("llama")
    requests = [experiment(landmarks("llama")) for experiment in EXPERIMENTS]
    results, buffers = run(engine, requests)
    turned, turned_buffers = run(engine, requests[::-1])

    for result, same in zip(results, turned[::-1], strict=True):
        torch.testing.assert_close(
            saved(result, buffers), saved(same, turned_buffers), rtol=0, atol=1e-10
        )


def test_a_forward_leaves_nothing_behind_for_the_next_one(load_engine: LoadEngine) -> None:
    engine = load_engine("gemma3")
    points = touchable(engine)
    victim = harmless(points)
    first, buffers = run(engine, [victim])

    run(engine, [poison(points, float("nan"))])
    second, second_buffers = run(engine, [victim])

    assert_same_bits(saved(second[0], second_buffers), saved(first[0], buffers))


def test_no_graph_can_change_a_parameter(load_engine: LoadEngine) -> None:
    engine = load_engine("llama")
    before = {name: p.clone() for name, p in engine._model.model.named_parameters()}
    recorder = Recorder()
    weight = recorder.parameter("lm_head.weight")
    for op in ("setitem", "masked_fill", "relu", "index_copy"):
        index = recorder.constant(torch.tensor([0]))
        mask = recorder.apply("gt", weight, 0.0)
        row = recorder.apply("getitem", weight, (slice(1),))
        arguments = {
            "setitem": (weight, 0, float("nan")),
            "masked_fill": (weight, mask, float("nan")),
            "relu": (weight,),
            "index_copy": (weight, 0, index, row),
        }[op]
        recorder.save(recorder.apply(op, *arguments))
    recorder.write("lm_head.input[args.0]", 1e300)

    results, _ = run(engine, [Request(recorder, [[PROMPT]])])

    assert results[0].fault is None
    for name, parameter in engine._model.model.named_parameters():
        assert torch.equal(parameter, before[name])
