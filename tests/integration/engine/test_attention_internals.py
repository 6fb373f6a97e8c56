"""What passes inside of attentions, held against transformers with an attention written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from tests.conftest import LoadEngine, MakeModel
from tests.generations import Driver
from tests.integration.engine.experiments import COLOSSEUM, EIFFEL, SHORT
from tests.requests import (
    Recorder,
    Request,
    assert_equal,
    every_family,
    landmarks,
    precision,
    run_and_save,
)

PORTS = ("query", "key", "value", "scores", "pattern", "result")

#: Called with what a port shows; what it returns, if anything, takes its place.
Touch = Callable[[torch.Tensor], torch.Tensor | None]


class Written:
    """Attention written out, in which each step can be seen and replaced."""

    def __init__(self) -> None:
        self.touches: dict[tuple[int, str], Touch] = {}
        self.seen: dict[tuple[int, str], torch.Tensor] = {}

    def __call__(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
    ) -> Any:
        def step(name: str, tensor: torch.Tensor) -> torch.Tensor:
            place = module.layer_idx, name
            changed = self.touches[place](tensor) if place in self.touches else None
            made = tensor if changed is None else changed
            self.seen[place] = made
            return made

        query, key = step("query", query), step("key", key)
        value = step("value", value)
        groups = query.shape[1] // key.shape[1]
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
        if (cap := options.get("softcap")) is not None:
            scores = cap * torch.tanh(scores / cap)
        scores = step("scores", scores + mask if mask is not None else scores)
        pattern = step("pattern", scores.softmax(-1))
        result = step("result", pattern @ value.repeat_interleave(groups, 1))
        return result.transpose(1, 2).contiguous(), None


WRITTEN = Written()
AttentionInterface.register("written_for_tests", WRITTEN)
AttentionMaskInterface.register("written_for_tests", eager_mask)


@contextmanager
def touching(touches: dict[tuple[int, str], Touch]) -> Iterator[Written]:
    WRITTEN.touches, WRITTEN.seen = touches, {}
    try:
        yield WRITTEN
    finally:
        WRITTEN.touches = {}


def plain(folder: Path, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="written_for_tests"
    )
    if dtype == torch.float64 and model.get_experts_implementation()[""] is not None:
        model.set_experts_implementation("eager")  # the default has no kernel in this dtype
    return model.eval()


def hook(family: str, port: str) -> str:
    return f"{landmarks(family).attention}.{port}"


def in_order(saved: dict[int, Any]) -> list[torch.Tensor]:
    return [saved[node] for node in sorted(saved)]


def reading(family: str, prompts: list[list[int]]) -> Request:
    recorder = Recorder()
    for port in PORTS:
        recorder.save(recorder.read(hook(family, port)))
    recorder.save(recorder.read("output[logits]"))
    return Request(recorder, [prompts])


@every_family
def test_each_step_is_what_transformers_computes(
    family: str, model_folder: MakeModel, load_engine: LoadEngine
) -> None:
    dtype, tolerance = precision(family)
    model = plain(model_folder(family, dtype), dtype)
    requests = [reading(family, [ids]) for ids in (EIFFEL, COLOSSEUM, SHORT)]

    together = run_and_save(load_engine(family, dtype), requests)

    for ids, saved in zip((EIFFEL, COLOSSEUM, SHORT), together, strict=True):
        with touching({}) as written, torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits
        wanted = [written.seen[1, port] for port in PORTS]
        for port, own, value in zip(PORTS, in_order(saved), wanted, strict=False):
            low = torch.finfo(dtype).min / 2
            assert own.shape == value.shape, port
            torch.testing.assert_close(
                own.clamp(min=low), value.clamp(min=low), rtol=0, atol=10 * tolerance, msg=port
            )
        torch.testing.assert_close(in_order(saved)[-1], logits, rtol=0, atol=10 * tolerance)


def halve_one_head(value: torch.Tensor) -> torch.Tensor:
    changed = value.clone()
    changed[:, 1] *= 0.5
    return changed


@every_family
@pytest.mark.parametrize("port", PORTS)
def test_a_write_to_one_head_reaches_the_logits(
    family: str, port: str, model_folder: MakeModel, load_engine: LoadEngine
) -> None:
    dtype, tolerance = precision(family)
    model = plain(model_folder(family, dtype), dtype)
    recorder = Recorder()
    value = recorder.read(hook(family, port))
    index = (slice(None), 1)
    half = recorder.apply("mul", recorder.apply("getitem", value, index), 0.5)
    recorder.write(hook(family, port), recorder.apply("setitem", value, index, half))
    recorder.save(recorder.read("output[logits]"))
    changing = Request(recorder, [[EIFFEL]])

    changed, read = run_and_save(load_engine(family, dtype), [changing, reading(family, [EIFFEL])])

    with touching({(1, port): halve_one_head}), torch.no_grad():
        wanted = model(torch.tensor([EIFFEL]), use_cache=False).logits
    with touching({}), torch.no_grad():
        untouched = model(torch.tensor([EIFFEL]), use_cache=False).logits
    torch.testing.assert_close(in_order(changed)[0], wanted, rtol=0, atol=10 * tolerance)
    torch.testing.assert_close(in_order(read)[-1], untouched, rtol=0, atol=10 * tolerance)
    assert (wanted - untouched).abs().max() > 100 * tolerance


def test_prompts_of_unequal_length_are_padded_on_the_left(load_engine: LoadEngine) -> None:
    engine = load_engine("llama")
    (together,) = run_and_save(engine, [reading("llama", [EIFFEL, SHORT])])
    alone = [run_and_save(engine, [reading("llama", [ids])])[0] for ids in (EIFFEL, SHORT)]

    padding = len(EIFFEL) - len(SHORT)
    for node, value in together.items():
        torch.testing.assert_close(value[:1], alone[0][node], rtol=0, atol=1e-10)
    _, _, _, _, pattern, *_ = in_order(together)
    short = in_order(alone[1])[4]
    torch.testing.assert_close(pattern[1:, :, padding:, padding:], short, rtol=0, atol=1e-10)
    assert pattern[1, :, :padding].abs().sum() == 0


def test_equal_prompts_share_their_rows_until_one_pattern_is_written(
    load_engine: LoadEngine,
) -> None:
    """A sweep over heads: each invoke ablates another one, all from the same rows."""
    engine = load_engine("llama")

    def ablation(heads: list[int]) -> Request:
        recorder = Recorder()
        for invoke, head in enumerate(heads):
            value = recorder.read("model.layers.1.self_attn.pattern", invoke)
            zeroed = recorder.apply("setitem", value, (slice(None), head), 0)
            recorder.write("model.layers.1.self_attn.pattern", zeroed, invoke)
            recorder.save(recorder.read("output[logits]", invoke))
        return Request(recorder, [[EIFFEL] for _ in heads])

    (together,) = run_and_save(engine, [ablation([0, 1, 2, 3])])
    for head, logits in enumerate(in_order(together)):
        (alone,) = run_and_save(engine, [ablation([head])])
        torch.testing.assert_close(logits, in_order(alone)[0], rtol=0, atol=1e-10)


def test_the_pattern_has_a_gradient(model_folder: MakeModel, load_engine: LoadEngine) -> None:
    model = plain(model_folder("llama", torch.float64), torch.float64)
    kept = []

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept.append(value.detach().requires_grad_())
        return kept[0]

    with touching({(1, "pattern"): keep}):
        model(torch.tensor([EIFFEL]), use_cache=False).logits[0, -1, 7].backward()

    recorder = Recorder()
    pattern = recorder.read("model.layers.1.self_attn.pattern")
    logit = recorder.apply("getitem", recorder.read("output[logits]"), (0, -1, 7))
    recorder.save(recorder.gradient(recorder.backward(logit), pattern))

    saved, _ = run_and_save(
        load_engine("llama"), [Request(recorder, [[EIFFEL]]), Request(recorder, [[COLOSSEUM]])]
    )

    assert_equal(saved, {max(saved): kept[0].grad}, 1e-10)


STEPS = 5


def generated_with(
    model: Any, prompts: list[list[int]], touches: dict[tuple[int, str], Touch], port: str
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Generate with plain transformers; return what layer 1 showed, and the logits, by step."""
    shown: list[torch.Tensor] = []

    def show(value: torch.Tensor) -> torch.Tensor | None:
        changed = touches.get((1, port), lambda tensor: None)(value)
        shown.append(value if changed is None else changed)
        return changed

    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    with touching({**touches, (1, port): show}), torch.no_grad():
        found = model.generate(
            torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return shown, list(found.logits)


def generating(family: str, prompts: list[list[int]], port: str, *, write: bool) -> Request:
    recorder = Recorder()
    with recorder.during(0):
        value = recorder.read(hook(family, port))
        if write:
            index = (slice(None), 1)
            half = recorder.apply("mul", recorder.apply("getitem", value, index), 0.5)
            value = recorder.apply("setitem", value, index, half)
            recorder.write(hook(family, port), value)
        recorder.save(value)
        logits = recorder.read("output[logits]")
        recorder.save(recorder.apply("getitem", logits, (slice(None), -1)))
    return Request(recorder, [prompts])


@every_family
@pytest.mark.parametrize("port", ["scores", "pattern"])
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_each_step_of_a_generation_shows_whom_its_token_attends_to(
    family: str, port: str, write: bool, model_folder: MakeModel, load_engine: LoadEngine
) -> None:
    dtype, tolerance = precision(family)
    model = plain(model_folder(family, dtype), dtype)
    touches = {(1, port): halve_one_head} if write else {}
    shown, logits = generated_with(model, [EIFFEL], touches, port)
    driver = Driver(load_engine(family, dtype))
    driver.start("other", generating(family, [COLOSSEUM], port, write=False), STEPS)
    driver.step()
    driver.start("own", generating(family, [EIFFEL], port, write=write), STEPS)

    outcome = driver.finish()["own"]

    assert outcome.fault is None, outcome.fault
    values, heads = (
        [outcome.saved[node, step] for step in range(STEPS)]
        for node in sorted({node for node, _ in outcome.saved})
    )
    low = torch.finfo(dtype).min / 4
    for step in range(STEPS):
        assert values[step].shape[-1] == len(EIFFEL) + step
        # With a sliding window transformers keeps no more than the keys in it.
        own = values[step][..., -shown[step].shape[-1] :].clamp(min=low)
        wanted = shown[step].clamp(min=low)
        torch.testing.assert_close(own, wanted, rtol=0, atol=10 * tolerance)
        # `generate` returns logits in float32.
        torch.testing.assert_close(heads[step].float(), logits[step], rtol=0, atol=1e-5)


def test_steps_of_prompts_of_unequal_length_are_padded_on_the_left(
    model_folder: MakeModel, load_engine: LoadEngine
) -> None:
    model = plain(model_folder("llama", torch.float64), torch.float64)
    prompts = [EIFFEL, SHORT]
    shown, logits = generated_with(model, prompts, {(1, "pattern"): halve_one_head}, "pattern")
    driver = Driver(load_engine("llama"))
    driver.start("own", generating("llama", prompts, "pattern", write=True), STEPS)

    outcome = driver.finish()["own"]

    first, second = sorted({node for node, _ in outcome.saved})
    for step in range(1, STEPS):
        torch.testing.assert_close(outcome.saved[first, step], shown[step], rtol=0, atol=1e-10)
        own = outcome.saved[second, step].float()
        torch.testing.assert_close(own, logits[step], rtol=0, atol=1e-5)
