"""Training on the server gives the losses and the values of local PyTorch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from ndif_client import Session, connect, errors, ops, optim
from ndif_client.lora import LoRA
from tests.conftest import MakeModel
from tests.integration.server.harness import running

PROMPTS = ["The Eiffel Tower is in", "A colosseum stands there", "Seven times six is", "Once upon"]
LABELS = [0, 1, 2, 1]
LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def folder(model_folder: MakeModel) -> Path:
    return model_folder("llama", torch.float32)


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running(folder, log, "--dtype", "float32") as server:
        yield server.url


@pytest.fixture
async def session(url: str) -> AsyncIterator[Session]:
    async with connect(url) as session:
        yield session


class Local:
    """The model as transformers has it."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, prompt: str) -> torch.Tensor:
        return torch.tensor([self.tokenizer(prompt).input_ids])

    def hidden(self, prompt: str) -> torch.Tensor:
        found: torch.Tensor = self.model(self.ids(prompt), output_hidden_states=True).hidden_states[
            2
        ]
        return found


OPTIMISERS = [
    (optim.SGD, torch.optim.SGD, {"lr": 0.003}),
    (optim.SGD, torch.optim.SGD, {"lr": 0.003, "momentum": 0.9, "weight_decay": 0.01}),
    (optim.SGD, torch.optim.SGD, {"lr": 0.003, "momentum": 0.9, "nesterov": True}),
    (optim.SGD, torch.optim.SGD, {"lr": 0.003, "momentum": 0.5, "dampening": 0.3}),
    (optim.Adam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    (optim.AdamW, torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.99)}),
]


@pytest.mark.parametrize(("ours", "theirs", "options"), OPTIMISERS, ids=range(len(OPTIMISERS)))
async def test_a_probe_trains_to_the_same_loss_curve(
    session: Session, folder: Path, ours: Any, theirs: Any, options: dict[str, Any]
) -> None:
    local = Local(folder)
    torch.manual_seed(0)
    start = torch.nn.Linear(48, 3)
    probe = torch.nn.Linear(48, 3)
    probe.load_state_dict(start.state_dict())
    optimiser = theirs(probe.parameters(), **options)
    wanted = []
    for prompt, label in list(zip(PROMPTS, LABELS, strict=True)) * 3:
        loss = cross_entropy(probe(local.hidden(prompt)[:, -1]), torch.tensor([label]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        wanted.append(loss.item())

    weight = await session.upload(start.weight.detach(), "probe.weight")
    bias = await session.upload(start.bias.detach(), "probe.bias")
    remote = ours([weight, bias], **options)
    async with session.chain() as chain:
        for prompt, label in list(zip(PROMPTS, LABELS, strict=True)) * 3:
            with chain.trace(prompt) as trace:
                hidden = session.model.layers[1].resid[:, -1]
                trace.loss = ops.cross_entropy(hidden @ weight.mT + bias, torch.tensor([label]))
                trace.loss.backward()
                remote.step()

    losses = [float(result.loss) for result in chain.results]
    assert losses == pytest.approx(wanted, rel=1e-4)
    trained = await session.fetch(weight)
    torch.testing.assert_close(trained, probe.weight.detach(), rtol=1e-3, atol=1e-5)


async def test_a_lora_adapter_trains_like_a_local_one_and_comes_back_for_peft(
    session: Session, folder: Path, tmp_path: Path
) -> None:
    modules = [f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.up_proj"]
    lora = await LoRA.create(session, modules, rank=4, alpha=8, seed=3)
    start = {path: [await session.fetch(f) for f in pair] for path, pair in lora.factors.items()}

    local = Local(folder)
    factors = {path: [f.clone().requires_grad_() for f in pair] for path, pair in start.items()}
    for path, (first, second) in factors.items():

        def add(m: Any, args: Any, output: Any, first: Any = first, second: Any = second) -> Any:
            return output + args[0] @ first.T @ second.T * 2

        local.model.get_submodule(path).register_forward_hook(add)
    optimiser = torch.optim.AdamW([f for pair in factors.values() for f in pair], lr=0.01)
    wanted = []
    for prompt in PROMPTS * 2:
        ids = local.ids(prompt)
        loss = cross_entropy(local.model(ids).logits[0, :-1], ids[0, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        wanted.append(loss.item())

    adam = optim.AdamW(lora.parameters, lr=0.01)
    async with session.chain() as chain:
        for prompt in PROMPTS * 2:
            with chain.trace(prompt) as trace:
                lora.apply()
                ids = local.ids(prompt)[0]
                logits = session.model.lm_head.output[0, :-1]
                trace.loss = ops.cross_entropy(logits, ids[1:])
                trace.loss.backward()
                adam.step()

    assert [float(r.loss) for r in chain.results] == pytest.approx(wanted, rel=1e-4)
    await lora.save(session, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for path, (first, second) in factors.items():
        for letter, factor in (("A", first), ("B", second)):
            own = weights[f"base_model.model.{path}.lora_{letter}.weight"]
            torch.testing.assert_close(own, factor.detach(), rtol=1e-3, atol=2e-5)

    again = await LoRA.load(session, tmp_path / "adapter")
    async with session.trace(PROMPTS[0]) as trace:
        again.apply()
        trace.logits = session.model.lm_head.output
    with torch.no_grad():
        logits = local.model(local.ids(PROMPTS[0])).logits
    torch.testing.assert_close(trace.result.logits, logits, rtol=1e-3, atol=1e-4)


async def test_adapters_of_two_users_share_a_forward(url: str) -> None:
    async with connect(url) as ann, connect(url) as bob:
        adapters = [
            await LoRA.create(each, f"{LAYER}.mlp.down_proj", rank=2, seed=seed, name="mine")
            for seed, each in enumerate((ann, bob))
        ]
        for each, adapter in zip((ann, bob), adapters, strict=True):
            _, second = adapter.factors[f"{LAYER}.mlp.down_proj"]
            async with each.trace() as filling:
                (second + 1).keep(second.name)
            assert filling.result is not None
        alone = []
        for each, adapter in zip((ann, bob), adapters, strict=True):
            async with each.trace(PROMPTS[0]) as trace:
                adapter.apply()
                trace.logits = each.model.lm_head.output
            alone.append(trace.result.logits)
        assert not torch.allclose(*alone)
        edited = []
        for each, adapter in zip((ann, bob), adapters, strict=True):
            with each.edit("adapter") as edit:
                adapter.apply()
            async with each.with_edits(edit).trace(PROMPTS[0]) as trace:
                trace.logits = each.model.lm_head.output
            edited.append(trace.result.logits)
        for own, wanted in zip(edited, alone, strict=True):
            torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)


async def test_mistakes_in_training_are_refused(session: Session) -> None:
    with pytest.raises(errors.GraphError, match="upload it first"):
        optim.Adam([torch.zeros(3)])  # type: ignore[list-item]
    zeros = await session.upload(torch.zeros(3))
    with pytest.raises(errors.GraphError, match="given twice"):
        optim.SGD([zeros, zeros])
    sgd = optim.SGD([await session.upload(torch.zeros(3), "mine")])
    with (
        pytest.raises(errors.GraphError, match="no backward before this step"),
        session.trace(PROMPTS[0]),
    ):
        sgd.step()
    with pytest.raises(errors.GraphError, match="no linear module"):
        await LoRA.create(session, f"{LAYER}.mlp")
