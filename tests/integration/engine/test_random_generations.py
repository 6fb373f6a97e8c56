"""Whatever comes, goes and is written when: each request gets what it would get alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.conftest import LoadEngine, LoadOracle
from tests.generations import Driver
from tests.integration.engine.experiments import EIFFEL, EXPERIMENTS, plain, touching_steps
from tests.oracle import Oracle
from tests.requests import EXACT, LLAMA, Recorder, Request, assert_equal

MOST_STEPS = 6

#: Some are equal, so that their rows are shared until somebody writes into them.
PROMPTS = (EIFFEL, EIFFEL[:3], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, *range(30, 52)])


def steered(ids: list[int], layer: int, strength: float) -> Request:
    """Push the residual stream after a layer, at every step."""
    recorder = Recorder()
    place = f"model.layers.{layer}.output"
    with recorder.during(0):
        hidden = recorder.read(place)
        recorder.write(place, recorder.apply("add", hidden, strength))
        logits = recorder.read("lm_head.output")
        recorder.save(recorder.apply("getitem", logits, (slice(None), -1)))
    return Request(recorder, [[ids]])


def made(kind: str, prompt: int, layer: int) -> Request:
    """Return a request by what describes it."""
    ids = PROMPTS[prompt]
    match kind:
        case "plain":
            return plain(ids)
        case "touching":
            return Request(touching_steps("llama").recorder, [[ids]])
        case "batch":
            return Request(touching_steps("llama").recorder, [[ids, PROMPTS[0]], [PROMPTS[1]]])
        case _:
            return steered(ids, layer, 0.5 * (1 + layer))


class Life(RuleBasedStateMachine):
    """Users of one engine, at random."""

    engine: Any
    oracle: Oracle

    @initialize()
    def begin(self) -> None:
        self.driver = Driver(self.engine)
        self.started: dict[str, tuple[str, int, int]] = {}
        self.out: list[str] = []

    @rule(
        kind=st.sampled_from(["plain", "touching", "batch", "steered", "steered"]),
        prompt=st.integers(0, len(PROMPTS) - 1),
        layer=st.integers(0, 2),
        steps=st.integers(1, MOST_STEPS),
        chunk=st.sampled_from([None, None, 1, 5]),
    )
    def arrive(self, kind: str, prompt: int, layer: int, steps: int, chunk: int | None) -> None:
        name = f"generation-{len(self.started)}"
        self.started[name] = kind, prompt, layer
        if kind in ("touching", "batch"):
            steps = max(steps, 4)  # the first steps at which all its nodes have run
        request = made(kind, prompt, layer)
        self.driver.start(name, request, steps, chunk=chunk if kind == "plain" else None)

    @rule(number=st.integers(0, len(EXPERIMENTS) - 1))
    def trace(self, number: int) -> None:
        request = EXPERIMENTS[number](LLAMA)
        (found,) = self.driver.step([request])
        assert_equal(found, traced(self.oracle, number), EXACT)

    @rule()
    def step(self) -> None:
        self.driver.step()

    @precondition(lambda self: self.driver.busy)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.driver.running)))
        self.out = [other for other in self.out if other != name]
        self.driver.stop(name)

    @precondition(lambda self: self.driver.swappable)
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        self.out.append(data.draw(st.sampled_from(self.driver.swappable)))
        self.driver.swap_out(self.out[-1])

    @precondition(lambda self: self.out)
    @rule()
    def swap_in(self) -> None:
        self.driver.swap_in(self.out.pop())

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        while self.out:
            self.swap_in()
        outcomes = self.driver.finish()
        assert len(self.driver.free) == self.engine.cache.num_pages, "pages were lost"
        for name, description in self.started.items():
            saved, tokens = alone(self.oracle, *description)
            outcome = outcomes[name]
            assert outcome.fault is None, outcome.fault
            steps = len(outcome.tokens[0])
            assert outcome.tokens == [own[:steps] for own in tokens]
            wanted = {key: value for key, value in saved.items() if key[1] < steps}
            assert_equal(outcome.saved, wanted, EXACT)


@cache
def alone(oracle: Oracle, kind: str, prompt: int, layer: int) -> Any:
    """Return what the oracle saves and generates."""
    request = made(kind, prompt, layer)
    return oracle.generate(request.invokes, request.recorder.graph(), MOST_STEPS)


@cache
def traced(oracle: Oracle, number: int) -> Any:
    return EXPERIMENTS[number](LLAMA).on(oracle)


@pytest.fixture
def life(load_engine: LoadEngine, load_oracle: LoadOracle) -> type[Life]:
    class OnLlama(Life):
        engine = load_engine("llama")
        oracle = load_oracle("llama")

    return OnLlama


def test_every_request_equals_its_solo_run_whatever_happens_around_it(life: type[Life]) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        life, settings=settings(max_examples=120, stateful_step_count=30, deadline=None)
    )
