"""Gradients through the client and a real server, against autograd on plain transformers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ndif_client import Session, connect, errors
from tests.conftest import MakeModel
from tests.integration.server.harness import running

PROMPT, OTHER = "The Eiffel Tower is in", "A colosseum stands there"


@pytest.fixture(scope="module")
def folder(model_folder: MakeModel) -> Any:
    return model_folder("llama", torch.float64)


@pytest.fixture(scope="module")
def url(folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with running(folder, tmp_path_factory.mktemp("server") / "log", "--dtype", "float64") as server:
        yield server.url


@pytest.fixture
async def session(url: str) -> AsyncIterator[Session]:
    async with connect(url) as session:
        yield session


def local(folder: Any, prompt: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the loss of a prompt, and what each layer has made, all with gradients."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = AutoTokenizer.from_pretrained(folder)(prompt).input_ids
    kept: dict[str, torch.Tensor] = {}
    for name, layer in enumerate(model.model.layers):

        def keep(module: Any, args: Any, output: torch.Tensor, name: int = name) -> Any:
            output.retain_grad()
            kept[str(name)] = output

        layer.register_forward_hook(keep)
    logits = model(torch.tensor([ids])).logits
    return logits[0, -1, 5] - logits[0, -1, 6], kept


def difference(session: Session) -> Any:
    logits = session.model.lm_head.output
    return logits[0, -1, 5] - logits[0, -1, 6]


async def test_gradients_equal_local_ones(session: Session, folder: Any) -> None:
    loss, kept = local(folder, PROMPT)
    loss.backward()

    async with session.trace(PROMPT) as trace:
        layers = [layer.output for layer in session.model.model.layers]
        metric = difference(session)
        metric.backward()
        trace.loss = metric
        trace.gradients = [hidden.grad for hidden in layers]
        # A new read of a hook point means the same value.
        trace.again = session.model.model.layers[1].output.grad

    result = trace.result
    torch.testing.assert_close(result.loss, loss.detach(), rtol=0, atol=1e-9)
    for name, gradient in enumerate(result.gradients):
        torch.testing.assert_close(gradient, kept[str(name)].grad, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.again, kept["1"].grad, rtol=0, atol=1e-9)


async def test_gradients_are_edited_in_place_and_by_assignment(
    session: Session, folder: Any
) -> None:
    loss, kept = local(folder, PROMPT)

    def edit(gradient: torch.Tensor) -> torch.Tensor:
        changed = gradient * 3
        changed[:, 0] = 0
        return changed

    kept["2"].register_hook(edit)
    kept["1"].register_hook(lambda gradient: gradient.tanh())
    loss.backward()

    async with session.trace(PROMPT) as trace:
        layers = [layer.output for layer in session.model.model.layers]
        with difference(session).backward():
            last = layers[2].grad
            last *= 3
            last[:, 0] = 0
            layers[1].grad = layers[1].grad.tanh()
            trace.first = layers[0].grad

    torch.testing.assert_close(trace.result.first, kept["0"].grad, rtol=0, atol=1e-9)


async def test_blocks_tell_which_backward_is_meant(session: Session) -> None:
    async with session.trace(PROMPT) as trace:
        hidden = session.model.model.layers[1].output
        logits = session.model.lm_head.output[0, -1]
        first = logits[5].backward()
        second = (2 * logits[5]).backward()
        with first:
            trace.once = hidden.grad
        trace.latest = hidden.grad
        with second:
            trace.twice = hidden.grad

    result = trace.result
    assert torch.equal(2 * result.once, result.twice)
    assert torch.equal(result.latest, result.twice)


async def test_many_users_gradients_share_forwards(url: str, folder: Any) -> None:
    async def one(prompt: str) -> tuple[str, torch.Tensor, int]:
        async with connect(url) as own, own.trace(prompt) as trace:
            hidden = own.model.model.layers[1].output
            difference(own).backward()
            trace.gradient = hidden.grad
        return prompt, trace.result.gradient, trace.result.statistics.groups

    answers = await asyncio.gather(*(one(prompt) for prompt in (PROMPT, OTHER) * 6))

    for prompt, gradient, _ in answers:
        loss, kept = local(folder, prompt)
        loss.backward()
        torch.testing.assert_close(gradient, kept["1"].grad, rtol=0, atol=1e-9)
    assert max(groups for _, _, groups in answers) > 1


async def test_mistakes_with_gradients_name_their_lines(session: Session) -> None:
    model = session.model
    with pytest.raises(errors.GraphError, match="before a backward"), session.trace(PROMPT):
        model.model.layers[1].output.grad.save()
    with pytest.raises(errors.GraphError, match="generation"), session.generate(PROMPT):
        model.lm_head.output.sum().backward()
    with pytest.raises(errors.GraphError, match="belongs to the model"), session.trace(PROMPT):
        model.lm_head.output.sum().backward()
        model.lm_head.weight.grad.save()
    with pytest.raises(errors.GraphError, match="only after the forward"), session.trace(PROMPT):
        hidden = model.model.layers[1].output
        model.lm_head.output.sum().backward()
        model.model.layers[2].output += hidden.grad

    with session.trace(PROMPT) as trace:
        early = model.model.layers[1].output
        early.sum().backward()
        model.model.layers[2].output.grad.save()
    with pytest.raises(errors.GraphError, match="does not depend on it") as refused:
        await trace
    assert "layers[2].output.grad" in str(refused.value)
    assert "early.sum().backward()" in str(refused.value)

    with session.trace(PROMPT) as trace:
        hidden = model.model.layers[1].output
        model.lm_head.output.backward()
        hidden.grad.save()
    with pytest.raises(errors.GraphError, match="not one number"):
        await trace
