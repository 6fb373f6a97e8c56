"""The gradient of what enters a module is that of the tensor, whoever else uses it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ndif_client import Session, connect
from tests.conftest import MakeModel
from tests.integration.server.harness import running

IDS = [5, 17, 99, 250, 3, 41, 8]
OTHER = [9, 8, 7]

#: Layers, and modules of them into which goes what others use as well.
INSIDE = {
    "gpt2": ("transformer.h.{}", ["ln_1", "attn", "attn.c_attn", "ln_2", "mlp", "mlp.act"]),
    "llama": (
        "model.layers.{}",
        ["input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
         "post_attention_layernorm", "mlp", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    ),
    "gpt_neox": (
        "gpt_neox.layers.{}",
        ["input_layernorm", "attention.query_key_value", "post_attention_layernorm", "mlp"],
    ),
    "qwen3_moe": ("model.layers.{}", ["post_attention_layernorm", "mlp", "mlp.gate"]),
    "bloom": ("transformer.h.{}", ["input_layernorm", "post_attention_layernorm", "mlp"]),
}  # fmt: skip


class Local:
    """The model with plain hooks: what enters each of the modules, and its gradient."""

    def __init__(self, folder: Path, paths: list[str]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        if self.model.get_experts_implementation()[""] is not None:
            self.model.set_experts_implementation("eager")
        self.entered: dict[str, torch.Tensor] = {}
        for path in paths:

            def keep(module: Any, args: Any, kwargs: Any, path: str = path) -> None:
                found = args[0] if args else kwargs["hidden_states"]
                found.retain_grad()
                self.entered[path] = found

            self.model.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True)

    def gradients(self, zeroed: str | None = None) -> dict[str, torch.Tensor]:
        logits = self.model(torch.tensor([IDS])).logits
        if zeroed is not None:
            self.entered[zeroed].register_hook(torch.zeros_like)
        logits[0, -1, 5].sin().backward()
        found = {}
        for path, value in self.entered.items():
            assert value.grad is not None
            found[path] = value.grad
        return found


@pytest.fixture(scope="module", params=INSIDE)
def served(
    request: pytest.FixtureRequest,
    model_folder: MakeModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, Path, list[str]]]:
    folder = model_folder(request.param, torch.float64)
    layer, inside = INSIDE[request.param]
    paths = [layer.format(number) for number in (0, 1)]
    paths += [f"{layer.format(number)}.{path}" for number in (0, 1) for path in inside]
    log = tmp_path_factory.mktemp("inputs") / "log"
    with running(folder, log, "--dtype", "float64") as server:
        yield server.url, folder, paths


@pytest.fixture
async def session(served: tuple[str, Path, list[str]]) -> AsyncIterator[Session]:
    async with connect(served[0], tensors="torch") as session:
        yield session


def entered(session: Session, path: str) -> Any:
    return session.model[path].input


async def test_it_is_the_whole_one_alone_and_among_those_who_write_there(
    session: Session, served: tuple[str, Path, list[str]]
) -> None:
    url, folder, paths = served
    async with connect(url) as other:

        def record() -> Any:
            with session.trace(IDS) as trace:
                values = [entered(session, path) for path in paths]
                session.model.unembed.output[0, -1, 5].sin().backward()
                trace.gradients = [value.grad for value in values]
            return trace

        def disturb(ids: list[int]) -> Any:
            with other.trace(ids) as trace:
                for path in paths:
                    other.model[path].input = other.model[path].input * 1.5
                value = other.model[paths[-1]].input
                other.model.unembed.output[0, -1, 5].sin().backward()
                trace.gradient = value.grad
            return trace

        results = [
            await record(),
            *(await asyncio.gather(disturb(OTHER), record(), disturb(IDS)))[1:2],
        ]
    wanted = Local(folder, paths).gradients()
    for result in results:
        for path, gradient in zip(paths, result.gradients, strict=True):
            torch.testing.assert_close(
                gradient, wanted[path], rtol=0, atol=1e-9, msg=lambda m, path=path: f"{path}: {m}"
            )


async def test_replaced_it_changes_all_that_follow_from_it(
    session: Session, served: tuple[str, Path, list[str]]
) -> None:
    _, folder, paths = served
    zeroed = next(path for path in paths if path.endswith(("ln_2", "post_attention_layernorm")))
    async with session.trace(IDS) as trace:
        stream = entered(session, paths[0])
        value = entered(session, zeroed)
        with session.model.unembed.output[0, -1, 5].sin().backward():
            value.grad = 0
            trace.gradient = stream.grad
    wanted = Local(folder, paths).gradients(zeroed)
    torch.testing.assert_close(trace.result.gradient, wanted[paths[0]], rtol=0, atol=1e-9)
