"""Random requests in one forward: whatever is asked, each gets what plain hooks give it alone."""

from __future__ import annotations

import random

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ndif_actor.engine.hookpoints import Site
from ndif_client.wire.graph import Ref
from tests.conftest import LoadEngine, LoadOracle
from tests.oracle import NeverRan
from tests.requests import EXACT, Recorder, Request, assert_equal, run, run_and_save, saved

ELEMENTWISE = ("tanh", "sin", "neg", "sigmoid")


class Author:
    """Writes a random request whose nodes come in the order of the forward, or before it."""

    def __init__(self, seed: int, sites: list[Site]) -> None:
        self.random = random.Random(seed)
        self.recorder = Recorder()
        choice = self.random.randint
        self.invokes = [
            [[choice(0, 299) for _ in range(choice(1, 6))] for _ in range(choice(1, 2))]
            for _ in range(choice(1, 2))
        ]
        steps = sorted(choice(0, len(sites) - 1) for _ in range(choice(1, 6)))
        for step in steps:
            self.visit(sites[step])
        self.recorder.save(self.recorder.read("output[logits]"))

    def visit(self, site: Site) -> None:
        """Read a hook point; change the value, maybe; write it, maybe; save it, maybe."""
        invoke = self.random.randrange(len(self.invokes))
        value = self.recorder.read(site.point, invoke)
        if self.random.random() < 0.8:
            value = self.changed(value)
        if self.random.random() < 0.6 and site.dtype.is_floating_point:
            self.recorder.write(site.point, value, invoke)
        if self.random.random() < 0.5:
            self.recorder.save(self.recorder.read(site.point, invoke))
        if self.random.random() < 0.5:
            self.recorder.save(value)

    def changed(self, value: Ref) -> Ref:
        match self.random.randrange(4):
            case 0:
                return self.recorder.apply(self.random.choice(ELEMENTWISE), value)
            case 1:
                index = (..., self.random.choice((0, -1, slice(1, None))))
                return self.recorder.apply("setitem", value, index, 0.5)
            case 2:
                return self.recorder.apply("mul", value, self.recorder.apply("cos", value))
            case _:
                mean = self.recorder.apply("mean", value, -1, True)
                return self.recorder.apply("sub", value, mean)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seeds=st.lists(st.integers(0, 2**32), min_size=1, max_size=4))
def test_random_requests_in_one_forward_equal_plain_hooks_alone(
    seeds: list[int], load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    engine, oracle = load_engine("qwen3"), load_oracle("qwen3")
    sites = [
        site
        for site in engine.blueprint.table.sites.values()
        if site.dtype.is_floating_point
        # A variance that becomes negative makes NaN, which the oracle's padding hands on.
        and not (site.point.operation and "norm" in site.point.path)
    ]
    authors = [Author(seed, sites) for seed in seeds]
    requests = [Request(author.recorder, author.invokes) for author in authors]

    together = run_and_save(engine, requests)

    for request, values in zip(requests, together, strict=True):
        assert_equal(values, request.on(oracle), EXACT)


class GradientAuthor(Author):
    """Writes a random request that also reads and writes gradients of what it reads."""

    def __init__(self, seed: int, sites: list[Site]) -> None:
        self.read: list[Ref] = []
        super().__init__(seed, sites)
        recorder, draw = self.recorder, self.random
        losses = []
        for invoke in range(len(self.invokes)):
            logits = recorder.read("output[logits]", invoke)
            losses.append(recorder.apply("sum", recorder.apply("sin", logits)))
        loss = losses[0] if len(losses) == 1 else recorder.apply("add", *losses)
        for _ in range(draw.randint(1, 2)):
            backward = recorder.backward(loss)
            for value in reversed(self.read):
                if draw.random() < 0.3:
                    gradient = recorder.gradient(backward, value)
                    changed = recorder.apply("mul", recorder.apply("cos", gradient), gradient)
                    recorder.write_gradient(backward, value, changed)
                if draw.random() < 0.7:
                    recorder.save(recorder.gradient(backward, value))

    def visit(self, site: Site) -> None:
        invoke = self.random.randrange(len(self.invokes))
        value = self.recorder.read(site.point, invoke)
        self.read.append(value)
        if self.random.random() < 0.6:
            self.recorder.write(site.point, self.changed(value), invoke)
            if self.random.random() < 0.5:
                self.read.append(self.recorder.read(site.point, invoke))


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seeds=st.lists(st.integers(0, 2**32), min_size=1, max_size=4),
    family=st.sampled_from(("qwen3", "gpt2", "gpt_neox")),
)
def test_random_gradients_in_one_forward_equal_plain_autograd_alone(
    seeds: list[int], family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    engine, oracle = load_engine(family), load_oracle(family)
    sites = [
        site
        for site in engine.blueprint.table.sites.values()
        if site.dtype.is_floating_point
        and not site.point.operation
        # What is masked in scores overflows as soon as anything is computed with it.
        and site.point.port != "scores"
        and "rotary" not in str(site)
    ]
    authors = [GradientAuthor(seed, sites) for seed in seeds]
    requests = [Request(author.recorder, author.invokes) for author in authors]

    results, buffers = run(engine, requests)

    for request, result in zip(requests, results, strict=True):
        try:
            wanted = request.on(oracle)
        except NeverRan:
            assert result.fault is not None
            assert "does not depend on" in result.fault.message
        else:
            found = saved(result, buffers)
            assert found.keys() == wanted.keys()
            for node, value in found.items():
                torch.testing.assert_close(
                    value, wanted[node], rtol=1e-7, atol=100 * EXACT, equal_nan=True
                )
