"""The client against a real server: every value equals transformers with plain hooks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ndif_client import Progress, Session, blocking, connect, errors, ops
from tests.conftest import MakeModel
from tests.integration.server.harness import Server, running

PROMPT = "The Eiffel Tower is in"
OTHER = "A colosseum stands there"

Hook = Callable[[torch.Tensor], torch.Tensor | None]


class Reference:
    """transformers, with hooks set by hand."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def logits(self, prompt: str | list[int], **hooks: Hook) -> torch.Tensor:
        """Run one prompt; a hook may replace the output of its module (`__` for dots)."""
        ids = self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        with self._hooked(hooks), torch.no_grad():
            logits: torch.Tensor = self.model(torch.tensor([ids])).logits
        return logits

    def output(self, prompt: str, path: str) -> torch.Tensor:
        """Return what a module gives for a prompt."""
        seen: list[torch.Tensor] = []
        self.logits(prompt, **{path.replace(".", "__"): lambda output: seen.append(output.clone())})
        return seen[0]

    @contextmanager
    def _hooked(self, hooks: dict[str, Hook]) -> Iterator[None]:
        handles = []
        for name, hook in hooks.items():
            module = self.model.get_submodule(name.replace("__", "."))
            handles.append(
                module.register_forward_hook(lambda _, args, output, hook=hook: hook(output))
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@pytest.fixture(scope="module")
def folder(model_folder: MakeModel) -> Path:
    return model_folder("llama", torch.float64)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("client") / "server.log"
    with running(folder, log, "--dtype", "float64") as server:
        yield server


@pytest.fixture
async def session(server: Server) -> AsyncIterator[Session]:
    async with connect(server.url) as session:
        yield session


@pytest.fixture
def model(session: Session) -> Any:
    return session.model


def _close(got: Any, expected: torch.Tensor) -> bool:
    return bool(got.shape == expected.shape and torch.allclose(got, expected, rtol=0, atol=1e-10))


# ---------------------------------------------------------------- values


async def test_operations_inside_of_a_forward_are_read_and_written(
    session: Session, model: Any, reference: Reference
) -> None:
    attention = model.model.layers[1].self_attn
    mlp = model.model.layers[1].mlp
    source = repr(attention.source)
    async with session.trace(PROMPT):
        query = attention.source.apply_rotary_pos_emb_0.output[0].save()
        given = attention.source.attention_interface_0.inputs.args[1].save()
        heads = attention.source.attention_interface_0.output[0].save()
        mlp.source.mul_0.output[:, -1] = 0
        logits = model.output.logits.save()
    async with session.trace(PROMPT):
        model.model.layers[1].mlp.down_proj.input[:, -1] = 0
        wanted = model.output.logits.save()

    assert "apply_rotary_pos_emb_0 -> " in source
    assert torch.equal(query.value, given.value)
    joined = heads.value.flatten(2)
    projected = joined @ reference.model.model.layers[1].self_attn.o_proj.weight.T
    assert _close(projected, reference.output(PROMPT, "model.layers.1.self_attn.o_proj"))
    assert _close(logits.value, wanted.value)
    with pytest.raises(errors.UnknownNameError, match="did you mean 'mul_0'"):
        _ = mlp.source.mull_0


async def test_operations_are_touched_at_the_steps_of_a_generation(
    session: Session, model: Any
) -> None:
    rotary = model.model.layers[0].self_attn.source.apply_rotary_pos_emb_0
    async with session.generate(PROMPT, max_new_tokens=3) as generation:
        with generation.all():
            query = rotary.output[0].save()
        with generation.steps[1:]:
            model.model.layers[2].source.add_1.output = 0
            after = model.model.layers[2].output.save()

    assert [value.shape[2] for value in query.value] == [len(generation.result.token_ids), 1, 1]
    assert [bool(value.any()) for value in after.value] == [False, False]


async def test_saved_activations_are_those_of_transformers(
    session: Session, model: Any, reference: Reference
) -> None:
    async with session.trace(PROMPT) as trace:
        hidden = model.model.layers[1].output.save()
        attention = model.model.layers[0].self_attn.output[0].save()
        logits = model.output.logits.save()
        top = model.lm_head.output[:, -1].topk(3).indices.save()

    expected = reference.logits(PROMPT)
    assert _close(hidden.value, reference.output(PROMPT, "model.layers.1"))
    assert _close(attention.value, reference.output(PROMPT, "model.layers.0.self_attn.o_proj"))
    assert _close(logits.value, expected)
    assert top.value.tolist() == expected[:, -1].topk(3).indices.tolist()
    assert trace.result.token_ids == reference.tokenizer(PROMPT).input_ids
    assert "".join(trace.result.tokens) == PROMPT


async def test_a_write_into_a_slice_reaches_the_model(
    session: Session, model: Any, reference: Reference
) -> None:
    def ablate(output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, -1] = 0
        output[:, 1, :5] += 2.5
        return output

    async with session.trace(PROMPT):
        mlp = model.model.layers[1].mlp.output
        mlp[:, -1] = 0
        mlp[:, 1, :5] += 2.5
        logits = model.lm_head.output.save()

    assert _close(logits.value, reference.logits(PROMPT, model__layers__1__mlp=ablate))


async def test_a_write_through_reshaped_heads_reaches_the_model(
    session: Session, model: Any, reference: Reference
) -> None:
    def ablate(output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output.view(1, -1, 4, 12).transpose(1, 2)[:, 2] = 0
        return output

    async with session.trace(PROMPT):
        heads = model.model.layers[0].self_attn.q_proj.output.view(1, -1, 4, 12).transpose(1, 2)
        heads[:, 2] = 0
        logits = model.lm_head.output.save()

    expected = reference.logits(PROMPT, model__layers__0__self_attn__q_proj=ablate)
    assert _close(logits.value, expected)


async def test_an_output_replaced_by_a_tensor_of_ones_own_reaches_the_model(
    session: Session, model: Any, reference: Reference
) -> None:
    steering = torch.linspace(-1, 1, 48, dtype=torch.float64)

    async with session.trace(PROMPT):
        model.model.layers[0].output = model.model.layers[0].output + steering
        logits = model.lm_head.output.save()

    expected = reference.logits(PROMPT, model__layers__0=lambda output: output + steering)
    assert _close(logits.value, expected)


async def test_activations_are_patched_from_one_prompt_into_another(
    session: Session, model: Any, reference: Reference
) -> None:
    clean = reference.output(PROMPT, "model.layers.1")[:, -1]

    def patch(output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, -1] = clean
        return output

    async with session.trace() as trace:
        with trace.invoke(PROMPT):
            donor = model.model.layers[1].output[:, -1]
        with trace.invoke(OTHER):
            model.model.layers[1].output[:, -1] = donor
            patched = model.lm_head.output.save()

    assert _close(patched.value, reference.logits(OTHER, model__layers__1=patch))
    assert len(trace.result.prompts) == 2


async def test_modules_can_be_called_on_values(
    session: Session, model: Any, reference: Reference
) -> None:
    hidden = reference.output(PROMPT, "model.layers.0")
    norm, head = reference.model.model.norm, reference.model.lm_head

    result = await session.trace(
        PROMPT, lambda m: {"lens": m.lm_head(m.model.norm(m.model.layers[0].output))}
    )

    with torch.no_grad():
        assert _close(result.lens, head(norm(hidden)))


async def test_an_input_can_be_read_and_written(
    session: Session, model: Any, reference: Reference
) -> None:
    embedded = reference.output(PROMPT, "model.embed_tokens")

    async with session.trace(PROMPT):
        before = model.model.layers[0].input.save()
        model.model.layers[0].input *= 2
        logits = model.lm_head.output.save()

    expected = reference.logits(PROMPT, model__embed_tokens=lambda output: output * 2)
    assert _close(before.value, embedded)
    assert _close(logits.value, expected)


async def test_parameters_are_constants_of_the_graph(
    session: Session, model: Any, reference: Reference
) -> None:
    async with session.trace(PROMPT):
        direction = model.lm_head.weight[7]
        projected = (model.model.layers[1].output @ direction).save()

    weight = reference.model.lm_head.weight[7].detach()
    assert _close(projected.value, reference.output(PROMPT, "model.layers.1") @ weight)


async def test_a_batch_of_prompts_of_different_lengths_is_padded_on_the_left(
    session: Session, model: Any, reference: Reference
) -> None:
    async with session.trace([PROMPT, "Hi"]) as trace:
        last = model.lm_head.output[:, -1].save()
        mask = model.inputs.kwargs["attention_mask"].save()

    expected = torch.cat([reference.logits(text)[:, -1] for text in (PROMPT, "Hi")])
    assert _close(last.value, expected)
    assert mask.value.sum(-1).tolist() == [len(p.ids) for p in trace.result.prompts[0]]


async def test_prompts_can_be_token_ids(session: Session, reference: Reference) -> None:
    ids = [5, 9, 33]

    result = await session.trace(torch.tensor(ids), lambda m: m.lm_head.output)

    assert _close(result.value, reference.logits(ids))


async def test_functions_and_structures_come_back_as_they_were_written(
    session: Session, model: Any, reference: Reference
) -> None:
    async with session.trace(PROMPT) as trace:
        layers = [layer.output.save() for layer in model.model.layers]
        trace.top = model.lm_head.output[:, -1].softmax(-1).topk(2)
        trace.masked = ops.where(layers[0] > 0, layers[0], 0.0)
    result = trace.result

    assert list(result) == ["layers", "top", "masked"]
    assert [_close(v, reference.output(PROMPT, f"model.layers.{n}"))
            for n, v in enumerate(result.layers)] == [True] * 3  # fmt: skip
    assert result.top._fields == ("values", "indices")
    assert torch.equal(result.masked, result.layers[0].clamp(min=0))


# ---------------------------------------------------------------- sharing


async def test_traces_awaited_together_share_one_forward(
    session: Session, model: Any, reference: Reference
) -> None:
    prompts = [PROMPT, OTHER, "x", "yes or no"]
    traces = [session.trace(prompt) for prompt in prompts]
    for trace in traces:
        with trace:
            trace.logits = model.lm_head.output

    results = await asyncio.gather(*traces)

    assert {result.statistics.forward for result in results} == {results[0].statistics.forward}
    assert results[0].statistics.groups == len(prompts)
    for prompt, result in zip(prompts, results, strict=True):
        assert _close(result.logits, reference.logits(prompt))


async def test_progress_is_told_as_it_happens(session: Session) -> None:
    steps: list[Progress] = []

    await session.trace(PROMPT, lambda m: m.lm_head.output, on_progress=steps.append)

    states = [step.state for step in steps]
    assert states == sorted(states, key=["queued", "running", "done"].index)
    assert states[-1] == "done"


def test_the_blocking_form_gives_the_same(server: Server, reference: Reference) -> None:
    with blocking.connect(server.url, tensors="numpy") as session:
        with session.together():
            with session.trace(PROMPT) as first:
                logits = session.model.lm_head.output.save()
            with session.trace(OTHER) as second:
                session.model.lm_head.output.save()
        text = session.decode(session.tokenize(PROMPT).ids)

    assert isinstance(logits.value, np.ndarray)
    assert _close(torch.tensor(logits.value), reference.logits(PROMPT))
    assert first.result.statistics.forward == second.result.statistics.forward
    assert text == PROMPT


# ---------------------------------------------------------------- faults


async def test_a_shape_error_is_raised_at_the_users_line(session: Session, model: Any) -> None:
    with pytest.raises(errors.GraphError, match="matmul") as refused:
        async with session.trace(PROMPT):
            (model.model.layers[0].output @ torch.ones(5, dtype=torch.float64)).save()

    text = str(refused.value)
    assert "48" in text
    assert text.endswith(
        "(model.model.layers[0].output @ torch.ones(5, dtype=torch.float64)).save()"
    )
    assert refused.value.fault is not None
    assert refused.value.fault.source is not None
    assert refused.value.fault.source.file == __file__


async def test_lines_are_told_in_order_while_it_runs(
    session: Session, reference: Reference
) -> None:
    model = session.model
    lines: list[str] = []
    async with session.trace(PROMPT) as trace:
        trace.log("begins", to=lines.append)
        norm = model.model.layers[0].output.norm()
        trace.log("norm", norm, 2, to=lines.append)
        with trace.when(norm < 0):
            trace.log("never", to=lines.append)
        trace.log(model.lm_head.output[0, -1, :2], to=lines.append)

    wanted = reference.output(PROMPT, "model.layers.0").norm()
    assert lines[:2] == ["begins", f"norm {wanted:.6g} 2"]
    assert lines[2].startswith("tensor([")
    assert len(lines) == 3


async def test_lines_of_a_generation_come_before_it_has_ended(session: Session) -> None:
    told: list[tuple[str, bool]] = []
    made: list[int] = []
    generation = session.generate(PROMPT, max_new_tokens=5)
    with generation, generation.all():
        top = session.model.lm_head.output[0, -1].argmax()
        generation.log("chose", top, to=lambda line: told.append((line, len(made) < 5)))
    async for token in generation:
        made.append(token.id)

    assert [line for line, _ in told] == [f"chose {token}" for token in made]
    assert all(early for _, early in told)


async def test_what_cannot_be_logged_is_refused_and_the_rest_is_printed(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    with session.trace(PROMPT) as trace:
        for items, words in (((), "1 to 64"), (([1, 2],), "texts and values")):
            with pytest.raises(errors.GraphError, match=words):
                trace.log(*items)
        trace.log("printed")
    await trace
    assert capsys.readouterr().out == "printed\n"


async def test_what_was_saved_before_a_failure_comes_back(
    session: Session, reference: Reference
) -> None:
    model = session.model
    trace = session.trace(PROMPT)
    with pytest.raises(errors.ExecutionError) as failed:
        async with trace:
            logits = model.lm_head.output.save()
            trace.last = logits[:, -1]
            lost = ops.embedding(logits.argmax(-1) + 1000, model.model.embed_tokens.weight).save()

    wanted = reference.logits(PROMPT)
    assert _close(logits.value, wanted)
    result = failed.value.result
    assert result is not None
    assert _close(result.last, wanted[:, -1])
    assert result.prompts[0][0].ids == reference.tokenizer(PROMPT).input_ids
    with pytest.raises(errors.NoValueError, match=r"has failed before(?s:.)*argmax"):
        _ = lost.value


async def test_a_generation_that_fails_gives_back_its_earlier_steps(session: Session) -> None:
    model = session.model
    with pytest.raises(errors.ExecutionError) as failed:
        async with session.generate(PROMPT, max_new_tokens=6) as trace:
            with trace.all():
                stream = model.model.norm.output[:, -1].save()
            with trace.steps[3]:
                ids = model.lm_head.output.argmax(-1) + 1000
                ops.embedding(ids, model.model.embed_tokens.weight).save()

    assert len(stream.value) in (3, 4)
    assert failed.value.result is not None
    assert len(failed.value.result.new_ids) == 3


async def test_a_fault_that_shows_only_while_it_runs_names_the_line_and_spares_the_others(
    session: Session, reference: Reference
) -> None:
    def bad(m: Any) -> Any:
        ids = m.lm_head.output[:, -1].argmax(-1) + 1000
        return ops.embedding(ids, m.model.embed_tokens.weight)  # beyond the vocabulary

    good = session.trace(PROMPT, lambda m: m.lm_head.output)
    outcomes = await asyncio.gather(good, session.trace(OTHER, bad), return_exceptions=True)

    assert _close(outcomes[0].value, reference.logits(PROMPT))  # type: ignore[union-attr]
    assert isinstance(outcomes[1], errors.ExecutionError)
    assert "beyond the vocabulary" in str(outcomes[1])


async def test_too_long_a_prompt_is_refused_by_name(session: Session) -> None:
    with pytest.raises(errors.LimitError, match="300 tokens"):
        await session.trace([5] * 300, lambda m: m.lm_head.output)


async def test_a_cancelled_trace_leaves_the_session_usable(
    session: Session, reference: Reference
) -> None:
    async def wait() -> Any:
        return await session.trace([[5] * 200] * 16, lambda m: m.lm_head.output.sum())

    tasks = [asyncio.create_task(wait()) for _ in range(4)]
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    result = await session.trace(PROMPT, lambda m: m.lm_head.output)
    assert _close(result.value, reference.logits(PROMPT))
