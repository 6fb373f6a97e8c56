"""Generations in the shared batch equal plain transformers alone, whatever happens around them."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import LoadEngine, LoadOracle
from tests.generations import Driver, Outcome
from tests.integration.engine.experiments import EXPERIMENTS, plain, touching_steps
from tests.requests import (
    EXACT,
    Recorder,
    Request,
    assert_equal,
    every_family,
    landmarks,
    precision,
)

PROMPTS = [
    [11, 22, 33, 44, 55, 66, 77],
    [5],
    [9, 8, 7, 6, 5, 4, 3, 2, 1, 10, 12, 14, 16, 18, 20, 2, 3],
]
STEPS = 6


def assert_as_alone(outcome: Outcome, request: Request, oracle: object, tolerance: float) -> None:
    graph, buffers = request.recorder.graph(), request.recorder.buffers
    steps = len(outcome.tokens[0])
    saved, tokens = oracle.generate(request.invokes, graph, steps, buffers)  # type: ignore[attr-defined]
    assert outcome.fault is None, outcome.fault
    assert outcome.tokens == tokens
    assert_equal(outcome.saved, saved, tolerance)


@every_family
def test_greedy_tokens_are_those_of_transformers_generate(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    driver = Driver(load_engine(family, torch.float32))
    model = load_oracle(family, torch.float32).model
    for number, ids in enumerate(PROMPTS):
        driver.start(f"request-{number}", plain(ids), 12)
        driver.step()  # the next one joins while this one decodes

    outcomes = driver.finish()

    for number, ids in enumerate(PROMPTS):
        wanted = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert outcomes[f"request-{number}"].tokens == [wanted[0, len(ids) :].tolist()]


@every_family
def test_interventions_at_chosen_steps_equal_plain_hooks(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    dtype, tolerance = precision(family)
    driver = Driver(load_engine(family, dtype))
    oracle = load_oracle(family, dtype)
    requests = {
        "before": plain(PROMPTS[2]),
        "touching": touching_steps(family),
        "batch": Request(touching_steps(family).recorder, [[PROMPTS[0], PROMPTS[0][::-1]]]),
        "after": plain(PROMPTS[1]),
    }
    for name, request in requests.items():
        driver.start(name, request, STEPS)
        driver.step()

    outcomes = driver.finish()

    for name, request in requests.items():
        assert_as_alone(outcomes[name], request, oracle, tolerance)


def test_prompts_of_unequal_length_generate_together_as_a_padded_batch_does(
    load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    request = Request(touching_steps("llama").recorder, [[PROMPTS[0], PROMPTS[1], PROMPTS[2]]])
    driver = Driver(load_engine("llama"))
    driver.start("batch", request, STEPS)

    outcomes = driver.finish()

    assert_as_alone(outcomes["batch"], request, load_oracle("llama"), EXACT)


def test_traces_share_forwards_with_generations(
    load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    driver, oracle = Driver(load_engine("llama")), load_oracle("llama")
    generation, traces = touching_steps("llama"), [e(landmarks("llama")) for e in EXPERIMENTS]
    driver.start("generation", generation, STEPS)

    while driver.busy:
        for trace, saved in zip(traces, driver.step(traces), strict=True):
            assert_equal(saved, trace.on(oracle), EXACT)

    assert_as_alone(driver.outcomes["generation"], generation, oracle, EXACT)


@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mistral", "gpt2"])
def test_a_prompt_fed_in_chunks_generates_the_same(
    family: str, chunk: int, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    dtype = torch.float32 if family == "gemma2" else torch.float64
    driver, request = Driver(load_engine(family, dtype)), plain(PROMPTS[2])
    driver.start("other", plain(PROMPTS[1]), 12)
    driver.start("chunked", request, STEPS, chunk=chunk)

    outcomes = driver.finish()

    assert_as_alone(outcomes["chunked"], request, load_oracle(family, dtype), EXACT)


def test_a_generation_that_was_swapped_out_goes_on_as_if_nothing_had_happened(
    load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    driver, request = Driver(load_engine("llama")), touching_steps("llama")
    driver.start("swapped", request, STEPS)
    driver.step()
    driver.step()
    driver.swap_out("swapped")
    driver.start("other", plain(PROMPTS[2] * 3), 3)  # takes the pages that have become free
    for _ in range(3):
        driver.step()
    driver.swap_in("swapped")

    outcomes = driver.finish()

    assert_as_alone(outcomes["swapped"], request, load_oracle("llama"), EXACT)


def test_a_failing_step_ends_its_own_generation_and_no_other(
    load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    driver, other = Driver(load_engine("llama")), touching_steps("llama")
    recorder = Recorder()
    with recorder.during(2):
        index = recorder.apply("argmax", recorder.read("lm_head.output"), -1)
        huge = recorder.apply("add", index, 10**6)
        recorder.save(recorder.call("model.embed_tokens", huge))
    driver.start("failing", Request(recorder, [[PROMPTS[0]]]), STEPS)
    driver.start("other", other, STEPS)

    outcomes = driver.finish()

    fault = outcomes["failing"].fault
    assert fault is not None and "out of range" in fault.message
    assert len(outcomes["failing"].tokens[0]) == 2
    assert_as_alone(outcomes["other"], other, load_oracle("llama"), EXACT)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_poisoned_generation_leaves_the_others_alone(
    value: float, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    driver, other = Driver(load_engine("llama")), touching_steps("llama")
    recorder = Recorder()
    with recorder.during(0, None):
        recorder.write("model.layers.0.output", value)
    for number in range(2):
        driver.start(f"poison-{number}", Request(recorder, [[PROMPTS[0]]]), 3)
    driver.start("other", other, STEPS)
    for _ in range(4):
        driver.step()
    driver.start("in its pages", plain(PROMPTS[2]), STEPS)

    outcomes = driver.finish()

    oracle = load_oracle("llama")
    assert_as_alone(outcomes["other"], other, oracle, EXACT)
    assert_as_alone(outcomes["in its pages"], plain(PROMPTS[2]), oracle, EXACT)


def test_samples_depend_on_the_seed_and_not_on_the_neighbours(load_engine: LoadEngine) -> None:
    engine = load_engine("llama")
    options = {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1}
    alone = Driver(engine)
    alone.start("a", plain(PROMPTS[0]), 12, seed=3, **options)
    wanted = alone.finish()["a"].tokens

    driver = Driver(engine)
    driver.start("first", plain(PROMPTS[2]), 4, temperature=2.0, seed=3)
    driver.step()
    driver.start("a", plain(PROMPTS[0]), 12, seed=3, **options)
    driver.start("b", plain(PROMPTS[0]), 12, seed=4, **options)
    outcomes = driver.finish()

    assert outcomes["a"].tokens == wanted
    assert outcomes["b"].tokens != wanted


def test_several_prompts_with_one_seed_get_noise_of_their_own(load_engine: LoadEngine) -> None:
    driver = Driver(load_engine("llama"))
    request = Request(Recorder(), [[PROMPTS[0]] * 3])
    driver.start("same", request, 12, seed=1, temperature=2.0)

    tokens = driver.finish()["same"].tokens

    assert len({tuple(own) for own in tokens}) == 3
