"""What researchers write by habit, from torch, transformers and NNsight, works or says why not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from ndif_client import Session, connect, errors
from tests.conftest import MakeModel
from tests.integration.client.plain import Plain
from tests.integration.server.harness import running

IDS = [5, 17, 99, 250, 3]


@pytest.fixture(scope="module")
def folder(model_folder: MakeModel) -> Path:
    return model_folder("gpt2", torch.float64)


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("habits") / "log"
    with running(folder, log, "--dtype", "float64") as server:
        yield server.url


@pytest.fixture
async def session(url: str) -> AsyncIterator[Session]:
    async with connect(url, tensors="torch") as session:
        yield session


async def test_what_a_tokenizer_returns_is_a_prompt(session: Session, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token_id = 1
    texts = ["The Eiffel Tower is in", "Rome"]
    for prompt in (
        tokenizer(texts),
        tokenizer(texts, return_tensors="pt", padding=True),
        {"input_ids": tokenizer(texts).input_ids},
    ):
        result = await session.trace(prompt, lambda m: {"h": m.layers[1].resid})
        wanted = await session.trace(texts, lambda m: {"h": m.layers[1].resid})
        torch.testing.assert_close(result.h, wanted.h, rtol=0, atol=1e-9)
    one = tokenizer(texts[0], return_tensors="pt")
    result = await session.trace(one, lambda m: {"h": m.layers[1].resid})
    assert result.h.shape == (1, one.input_ids.shape[1], 48)
    with pytest.raises(errors.GraphError, match="more than padding"):
        session.trace({"input_ids": IDS, "attention_mask": [1, 1, 0, 1, 1]})
    with pytest.raises(errors.GraphError, match="has input_ids"):
        session.trace({"text": "no"})
    one_each = pytest.raises(errors.GraphError, match="every invoke has one of its own")
    with one_each, session.trace() as trace, trace.invoke():
        pass


async def test_keys_of_a_dict_come_back_as_they_were(session: Session) -> None:
    async with session.trace(IDS) as trace:
        trace.found = {n: layer.resid for n, layer in enumerate(session.model.layers)}
        trace.pairs = {(0, "a"): session.model.layers[0].resid[0, -1]}
    assert list(trace.result.found) == [0, 1, 2]
    assert trace.result.pairs[0, "a"].shape == (48,)


async def test_gradients_are_asked_for_as_torch_has_it(session: Session, folder: Path) -> None:
    async with session.trace(IDS) as trace:
        early, late = session.model.layers[0].resid, session.model.layers[1].resid
        early.requires_grad = True
        loss = session.model.unembed.output[0, -1, 7]
        trace.both = torch.autograd.grad(loss, [early, late], retain_graph=True)
        (trace.one,) = torch.autograd.grad(loss, early)
        loss.backward(inputs=[early])
        trace.part = early[:, -1].grad
        trace.whole = early.grad
    result = trace.result
    torch.testing.assert_close(result.both[0], result.whole, rtol=0, atol=0)
    torch.testing.assert_close(result.one, result.whole, rtol=0, atol=0)
    torch.testing.assert_close(result.part, result.whole[:, -1], rtol=0, atol=0)
    assert not torch.allclose(result.both[1], result.whole)


async def test_the_gradient_of_one_head_is_its_part_of_all(session: Session) -> None:
    async with session.trace(IDS) as trace:
        attention = session.model.layers[1].attn
        with session.model.unembed.output[0, -1, 7].backward():
            trace.one = attention.heads[2].pattern.grad
            trace.all = attention.pattern.grad
        with session.model.unembed.output[0, -1, 7].backward():
            attention.heads[2].result.grad = 0
            trace.changed = attention.result.grad
    torch.testing.assert_close(trace.result.one, trace.result.all[:, 2], rtol=0, atol=0)
    assert not trace.result.changed[:, 2].any()
    assert trace.result.changed[:, 1].any()


async def test_a_tensor_that_wants_a_gradient_here_is_warned_about(session: Session) -> None:
    probe = torch.nn.Linear(48, 2, dtype=torch.float64)
    with session.trace(IDS) as trace:
        stream = session.model.layers[1].resid
        scores = probe(stream[:, -1])
        with pytest.warns(UserWarning, match=r"session\.upload.*\n.*scores = probe"):
            scores.sum().backward()
        trace.gradient = stream.grad
    assert (await trace).gradient.any()
    with session.trace(IDS) as trace:
        stream = session.model.layers[1].resid
        (stream[:, -1] @ probe.weight.detach().mT).sum().backward()
        trace.gradient = stream.grad
    assert (await trace).gradient.any()


async def test_an_edit_may_be_inside_of_a_forward(session: Session, tmp_path: Path) -> None:
    forward = session.model.transformer.h[1].source
    name = next(name for name in forward if name.startswith("add"))
    with session.edit("inside") as edit:
        getattr(session.model.transformer.h[1].source, name).output[:, 0] = 0
    edit.save(tmp_path / "inside.ndif-edit")
    edited = session.with_edits(type(edit).load(tmp_path / "inside.ndif-edit"))
    changed = await edited.trace(IDS, lambda m: {"h": m.layers[1].resid})
    async with session.trace(IDS) as trace:
        getattr(session.model.transformer.h[1].source, name).output[:, 0] = 0
        trace.h = session.model.layers[1].resid
    torch.testing.assert_close(changed.h, trace.result.h, rtol=0, atol=0)


async def test_modules_and_heads_are_themselves(session: Session) -> None:
    model = session.model
    assert model.layers[1] == model.transformer.h[1]
    assert model.layers[1].mlp in {model.layers[1].mlp}
    assert model.layers[1] != model.layers[2]
    async with session.trace(IDS) as trace:
        trace.norms = [head.result.norm() for head in model.layers[1].attn.heads]
    assert len(trace.result.norms) == 4


async def test_caches_have_names_of_their_own_and_take_standard_ones(session: Session) -> None:
    async with session.trace(IDS) as trace:
        streams = trace.cache()
        mlps = trace.cache("layers.*.mlp")
        with pytest.raises(errors.NoValueError, match="at the end of the trace's block"):
            streams["transformer.h.0"]
        with pytest.raises(errors.GraphError, match="is no module"):
            trace.cache([model_source(session)])
    assert len(streams) == len(mlps) == 3
    assert set(trace.result.keys()) == {"cache", "cache_2"}


def model_source(session: Session) -> Any:
    source = session.model.transformer.h[1].source
    return source[next(iter(source))]


async def test_steps_are_no_loop_and_carry_nothing(session: Session) -> None:
    with session.generate(IDS, max_new_tokens=4) as generation:
        total = session.model.layers[1].resid[0, -1] * 0
        with pytest.raises(errors.GraphError, match="steps are no loop"):
            for _ in generation.steps[:]:
                pass
        with (
            pytest.raises(
                errors.OrderError, match=r"'total' is made of its own value(?s:.*)total \+"
            ),
            generation.all(),
        ):
            total = total + session.model.layers[1].resid[0, -1]
        with generation.all():
            own = session.model.layers[1].resid[0, -1].save("own")
        with pytest.raises(errors.OrderError, match="outside of their block"):
            own * 2
    assert len((await generation).own) == 4
    for name, message in (("stop", "ends by itself"), ("iter", r"gen\.all\(\)")):
        with pytest.raises(AttributeError, match=message):
            getattr(generation, name)


async def test_values_made_without_gradients_and_copies_are_torchs(
    session: Session, folder: Path
) -> None:
    stream = Plain(folder).streams(IDS)[1]
    async with session.trace(IDS) as trace:
        h = session.model.layers[1].resid
        turned = h.transpose(1, 2).contiguous()
        turned[:, 3] = 0
        h.double()[:, 0] = 1  # the same dtype: the same tensor
        trace.h, trace.turned = h, turned.clone()
    wanted = stream.clone()
    copied = wanted.transpose(1, 2).clone()
    copied[:, 3] = 0
    wanted[:, 0] = 1
    torch.testing.assert_close(trace.result.h, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(trace.result.turned, copied, rtol=0, atol=1e-9)
