"""Generations that leave values on a real server, for the traces and generations after them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch

from ndif_client import Session, connect, errors
from tests.conftest import MakeModel
from tests.integration.server.harness import Server, running

PROMPT = "The Eiffel Tower is in"
OTHER = "A colosseum stands there"
STEPS = 4


@pytest.fixture(scope="module")
def server(model_folder: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("keeping") / "server.log"
    with running(model_folder("llama"), log) as server:
        yield server


@pytest.fixture
async def session(server: Server) -> AsyncIterator[Session]:
    async with connect(server.url) as session:
        yield session


@pytest.fixture
def model(session: Session) -> Any:
    return session.model


async def test_what_is_kept_at_the_prefill_at_a_step_and_at_all_of_them_is_held(
    session: Session, model: Any
) -> None:
    layer = model.model.layers[1]
    async with session.generate(PROMPT, max_new_tokens=STEPS) as generation:
        with generation.steps[0]:
            prompt = layer.output.keep("prompt")
            whole = layer.output.save()
        with generation.steps[2]:
            layer.output.keep("third")
            third = layer.output.save()
        with generation.all():
            layer.output[:, -1].keep("last")
            last = layer.output[:, -1].save()

    assert torch.equal(await session.fetch(prompt), whole.value)
    assert torch.equal(await session.fetch("third"), third.value)
    assert torch.equal(await session.fetch("last"), last.value[-1])
    assert len(last.value) == STEPS


async def test_what_a_generation_keeps_steers_the_next_of_its_chain(
    session: Session, model: Any
) -> None:
    layer = model.model.layers[1]
    async with session.chain() as chain:
        generation = chain.generate(PROMPT, max_new_tokens=STEPS)
        with generation, generation.steps[1:]:
            layer.output.keep("direction")
            seen = layer.output.save()
        with chain.trace(OTHER) as trace:
            layer.output += session.held("direction")
            trace.steered = layer.output.save()
        second = chain.generate(OTHER, max_new_tokens=STEPS)
        with second, second.all():
            layer.output += 100 * session.held("direction")
            steered = layer.output[:, -1].save()
    async with session.trace(OTHER):
        plain = layer.output.save()

    assert torch.equal(trace.result.steered, plain.value + seen.value[-1])
    direction = await session.upload(seen.value[-1])
    async with session.generate(OTHER, max_new_tokens=STEPS) as again:
        with again.all():
            layer.output += 100 * direction
            expected = layer.output[:, -1].save()
    assert torch.equal(torch.cat(steered.value), torch.cat(expected.value))


async def test_a_generation_that_ends_before_keeps_only_what_it_has_come_to(
    session: Session, model: Any
) -> None:
    layer = model.model.layers[1]
    async with session.generate(PROMPT, max_new_tokens=STEPS) as generation:
        with generation.steps[0]:
            layer.output.keep("early")
        with generation.steps[1]:
            generation.stop_when(layer.output.sum() == layer.output.sum())
        with generation.steps[3]:
            layer.output.keep("late")

    assert set(await session.held_values()) == {"early"}
    with pytest.raises(errors.GraphError, match="nothing is held as 'late'"):
        async with session.trace(OTHER):
            session.held("late").save()


async def test_who_counts_on_what_was_never_kept_is_told_so(session: Session, model: Any) -> None:
    layer = model.model.layers[1]
    with pytest.raises(errors.ExecutionError, match=r"'late' is not held any more.* ended before"):
        async with session.chain() as chain:
            with chain.generate(PROMPT, max_new_tokens=STEPS) as generation:
                with generation.steps[1]:
                    generation.stop_when(layer.output.sum() == layer.output.sum())
                with generation.steps[3]:
                    layer.output.keep("late")
            with chain.trace(OTHER):
                (session.held("late") * 2).save()


async def test_a_generation_that_fails_or_is_left_keeps_nothing(
    session: Session, model: Any
) -> None:
    layer = model.model.layers[1]
    with pytest.raises(errors.ExecutionError):
        async with session.generate(PROMPT, max_new_tokens=STEPS) as generation:
            with generation.steps[0]:
                layer.output.keep("x")
            with generation.steps[2]:
                ids = (layer.output.sum() * 0 + 10**6).long()
                model.model.embed_tokens(ids).save()
    left = session.generate(PROMPT, max_new_tokens=200)
    with left, left.steps[0]:
        layer.output.keep("x")
    async for _ in left:
        break
    await left.cancel()

    assert await session.held_values() == {}


async def test_a_value_that_grows_with_the_steps_is_kept_at_one_of_them(
    session: Session, model: Any
) -> None:
    attention = model.model.layers[1].self_attn
    with pytest.raises(errors.GraphError, match=r"kept at steps 1:, .* not of one shape.*one step"):
        async with session.generate(PROMPT, max_new_tokens=STEPS) as generation:
            with generation.steps[1:]:
                attention.pattern.keep("pattern")
    with pytest.raises(errors.GraphError, match=r"kept at all steps, .* not of one shape"):
        async with session.generate(PROMPT, max_new_tokens=STEPS) as generation:
            with generation.all():
                model.model.layers[1].output.keep("stream")

    async with session.generate(PROMPT, max_new_tokens=STEPS) as generation:
        with generation.steps[2]:
            attention.pattern.keep("pattern")
            pattern = attention.pattern.save()
    assert torch.equal(await session.fetch("pattern"), pattern.value)
