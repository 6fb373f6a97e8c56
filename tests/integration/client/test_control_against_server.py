"""Conditions, choices, loops and random numbers through the client and a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ndif_client import blocking, errors, ops
from tests.conftest import MakeModel
from tests.integration.server.harness import running

PROMPT, OTHER = "The Eiffel Tower is in", "A colosseum stands there"


@pytest.fixture(scope="module")
def folder(model_folder: MakeModel) -> Path:
    return model_folder("llama", torch.float64)


@pytest.fixture(scope="module")
def session(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running(folder, log, "--dtype", "float64") as server, blocking.connect(server.url) as own:
        yield own


def logits(folder: Path, prompt: str, change: Any = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = AutoTokenizer.from_pretrained(folder)(prompt).input_ids
    if change is not None:
        model.model.layers[1].register_forward_hook(lambda module, args, output: change(output))
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids])).logits
    return found


@pytest.mark.parametrize("threshold", [-1e9, 1e9])
def test_only_the_branch_that_holds_reaches_the_model(
    session: Any, folder: Path, threshold: float
) -> None:
    model = session.model
    with session.trace(PROMPT) as trace:
        hidden = model.model.layers[1].output
        large = hidden.norm() > threshold
        with trace.when(large) as branch:
            hidden[:, -1] = 0
            doubled = (hidden * 2).save("doubled")
        with branch.otherwise():
            model.model.layers[1].output = hidden.tanh()
            halved = (hidden / 2).save("halved")
        trace.after = hidden
        trace.logits = model.lm_head.output

    def change(output: torch.Tensor) -> torch.Tensor:
        if output.norm() <= threshold:
            return output.tanh()
        output[:, -1] = 0
        return output

    torch.testing.assert_close(
        trace.result.logits, logits(folder, PROMPT, change), rtol=0, atol=1e-9
    )
    assert bool((trace.result.after[:, -1] == 0).all()) == (threshold < 0)
    made, absent = (doubled, halved) if threshold < 0 else (halved, doubled)
    assert made.value.shape == trace.result.after.shape
    with pytest.raises(errors.NoValueError, match="condition did not hold"):
        _ = absent.value


def test_a_choice_and_a_loop_follow_the_values(session: Any) -> None:
    with session.trace(PROMPT) as trace:
        value = session.model.model.layers[0].output[0, -1]
        norm = value.norm()
        trace.start = norm
        rounds, last = trace.while_loop(
            lambda count, scaled: scaled.norm() > 0.01,
            lambda count, scaled: (count + 1, scaled / 2),
            (0, value),
            limit=100,
        )
        trace.rounds, trace.last = rounds, last.norm()
        few, _ = trace.while_loop(
            lambda count, scaled: scaled.norm() > 0.01,
            lambda count, scaled: (count + 1, scaled / 2),
            (0, value),
            limit=2,
        )
        trace.few = few
        trace.chosen = trace.choose(norm > 0, norm * 2, norm)

    result = trace.result
    norm, count = float(result.start), 0
    while norm > 0.01:
        norm, count = norm / 2, count + 1
    assert int(result.rounds) == count > 2
    assert float(result.last) == pytest.approx(norm)
    assert int(result.few) == 2
    assert float(result.chosen) == pytest.approx(2 * float(result.start))


def test_random_numbers_are_those_of_torch_with_the_same_seed(session: Any) -> None:
    torch.manual_seed(5)
    wanted = [torch.randn(3, 4), torch.rand(2), torch.randint(0, 9, (4,)), torch.randperm(6)]
    kept = torch.nn.functional.dropout(torch.ones(1000), 0.3)

    def record() -> Any:
        with session.trace(PROMPT, seed=5) as trace:
            trace.numbers = [
                ops.randn(3, 4),
                ops.rand(2),
                ops.randint(0, 9, (4,)),
                ops.randperm(6),
            ]
            trace.kept = ops.ones(1000).dropout(0.3)
        return trace.result

    with session.together():
        first, second = (session.trace(PROMPT, seed=5) for _ in range(2))
        for trace in (first, second):
            with trace:
                trace.noise = session.model.model.layers[0].output.randn_like()
    result = record()

    for own, number in zip(result.numbers, wanted, strict=True):
        assert torch.equal(own, number)
    assert torch.equal(result.kept, kept)
    assert torch.equal(first.result.noise, second.result.noise)
    with session.trace(PROMPT) as drawn:
        drawn.noise = ops.randn(3)
    with session.trace(PROMPT, seed=drawn.seed) as again:
        again.noise = ops.randn(3)
    assert torch.equal(drawn.result.noise, again.result.noise)


def test_a_generation_steers_only_where_a_condition_holds(session: Any) -> None:
    with session.generate(PROMPT, max_new_tokens=4) as plain, plain.all():
        plain.norms = session.model.model.layers[1].output[:, -1].norm()
    middle = sorted(map(float, plain.result.norms))[1]
    with session.generate(PROMPT, max_new_tokens=4) as gen, gen.all():
        hidden = session.model.model.layers[1].output
        with gen.when(hidden[:, -1].norm() > middle):
            gen.large = hidden[:, -1].norm()
    assert [float(value) > middle for value in gen.result.large] == [True] * len(gen.result.large)
    assert 0 < len(gen.result.large) < 4


def test_a_generation_ends_with_the_step_whose_condition_holds(session: Any) -> None:
    other = [3, 4, 5]
    with session.generate([PROMPT, other], max_new_tokens=8) as plain, plain.all():
        plain.norms = session.model.model.layers[1].output[0, -1].norm()
    norms = [float(value) for value in plain.result.norms]
    enough = norms[3] * (1 - 1e-9)
    last = next(step for step, norm in enumerate(norms) if step > 0 and norm > enough)
    with session.generate([PROMPT, other], max_new_tokens=8, seed=1) as gen, gen.steps[1:]:
        norm = session.model.model.layers[1].output[0, -1].norm()
        gen.stop_when(norm > enough)
        gen.norms = norm

    for ended, whole in zip(gen.result.completions[0], plain.result.completions[0], strict=True):
        assert ended.ids == whole.ids[: last + 1]
        assert ended.finish == "condition"
    assert list(map(float, gen.result.norms)) == norms[1 : last + 1]


def test_a_generation_that_only_may_end_early_saves_nothing_and_runs(session: Any) -> None:
    with session.generate(PROMPT, max_new_tokens=5) as gen, gen.all():
        gen.stop_when(session.model.model.layers[0].output.norm() < 0)
    assert gen.result.completion.finish == "length"
    with session.generate(PROMPT, max_new_tokens=5) as gen:
        gen.stop_when(session.model.model.layers[0].output.norm() > 0)
    assert len(gen.result.new_ids) == 1


def test_mistakes_with_conditions_name_their_lines(session: Any) -> None:
    model = session.model
    with pytest.raises(errors.GraphError, match="outside of it"), session.trace(PROMPT) as trace:
        hidden = model.model.layers[1].output
        with trace.when(hidden.norm() > 1):
            inner = hidden * 2
        (inner + 1).save()
    with pytest.raises(errors.GraphError, match="Python's own"), session.trace(PROMPT) as trace:
        trace.when(True)
    with pytest.raises(errors.GraphError, match="bound"), session.trace(PROMPT) as trace:
        trace.while_loop(lambda x: x > 0, lambda x: x - 1, 3, limit=0)
    with (
        pytest.raises(errors.GraphError, match="one number"),
        session.trace(PROMPT) as trace,
        trace.when(model.model.layers[1].output > 1),
    ):
        model.lm_head.output.save()
    with (
        pytest.raises(errors.GraphError, match="one number"),
        session.generate(PROMPT, max_new_tokens=3) as gen,
        gen.all(),
    ):
        gen.stop_when(model.model.layers[1].output > 1)
    with (
        pytest.raises(errors.GraphError, match="Python's own"),
        session.generate(PROMPT, max_new_tokens=3) as gen,
    ):
        gen.stop_when(True)
