"""Adapters of many users in one forward: each has what it would have alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ndif_client import Session, connect, errors, ops
from ndif_client.lora import LoRA
from ndif_client.results import Result
from tests.conftest import MakeModel
from tests.integration.client.plain import Plain
from tests.integration.server.harness import running

#: A family, its number of shards, and linear modules whose shards are cut along either side.
SERVED = [
    ("gpt2", 1, ["transformer.h.*.attn.c_attn", "transformer.h.*.mlp.c_proj"]),
    ("llama", 2, ["model.layers.*.self_attn.?_proj", "model.layers.*.mlp.down_proj"]),
]

#: What each of the users reads, and the rank of what each has trained.
PROMPTS = [[5, 17, 99, 250, 3], [5, 17, 99, 250, 3], [7, 30], [9, 8, 7, 6, 5, 4, 3], [11]]
RANKS = [2, 2, 2, 3, 2]


@pytest.fixture(scope="module", params=SERVED, ids=lambda served: "{}-tp{}".format(*served))
def served(
    request: pytest.FixtureRequest,
    model_folder: MakeModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, Path, list[str]]]:
    """The URL of a server, the folder of its model, and the modules to adapt."""
    family, shards, modules = request.param
    folder = model_folder(family, torch.float64)
    log = tmp_path_factory.mktemp("adapters") / "log"
    with running(folder, log, "--dtype", "float64", "--tp", str(shards)) as server:
        yield server.url, folder, modules


User = tuple[Session, LoRA]


@pytest.fixture
async def users(served: tuple[str, Path, list[str]]) -> AsyncIterator[list[User]]:
    """Sessions with an adapter each, none of them zero."""
    url, _, modules = served
    async with AsyncExitStack() as stack:
        found = []
        for seed, rank in enumerate(RANKS):
            session = await stack.enter_async_context(connect(url, tensors="torch"))
            lora = await LoRA.create(session, modules, rank=rank, alpha=2 * rank, seed=seed)
            generator = np.random.default_rng(100 + seed)
            for _, second in lora.factors.values():
                zeros = np.asarray(await session.fetch(second))
                drawn = generator.normal(size=zeros.shape).astype(np.float32)
                await session.upload(drawn, second.name)
            found.append((session, lora))
        yield found


async def together(session: Session, *traces: Any) -> list[Any]:
    """Run traces that arrive while the server is busy, and so can share a forward."""
    with session.trace(PROMPTS[0]) as busy:
        value = ops.eye(1000, 1000)
        for _ in range(10):
            value = value @ value
        busy.value = value[0, 0]
    first = asyncio.ensure_future(_awaited(busy))
    await asyncio.sleep(0.05)
    results = await asyncio.gather(*traces, return_exceptions=True)
    await first
    return results


async def _awaited(trace: Any) -> Any:
    return await trace


def record(session: Session, lora: LoRA, ids: Sequence[int]) -> Any:
    with session.trace(list(ids)) as trace:
        lora.apply()
        trace.logits = session.model.unembed.output
    return trace


class Adapted:
    """The model of transformers with a user's adapter, by hooks."""

    def __init__(self, folder: Path) -> None:
        self._plain = Plain(folder)

    async def hooks(self, session: Session, lora: LoRA, *, grad: bool = False) -> Any:
        stack = ExitStack()
        factors = {}
        for path, pair in lora.factors.items():
            own = [torch.as_tensor(await session.fetch(f)).double() for f in pair]
            factors[path] = [factor.requires_grad_(grad) for factor in own]

            def add(module: Any, args: Any, output: Any, path: str = path) -> Any:
                first, second = factors[path]
                return output + args[0] @ first.mT @ second.mT * lora.scaling(path)

            module = self._plain.model.get_submodule(path)
            stack.callback(module.register_forward_hook(add).remove)
        return stack, factors

    async def logits(self, session: Session, lora: LoRA, ids: Sequence[int]) -> torch.Tensor:
        stack, _ = await self.hooks(session, lora)
        with stack:
            return self._plain.run(ids)

    async def tokens(
        self, session: Session, lora: LoRA, ids: Sequence[int], steps: int
    ) -> list[int]:
        stack, _ = await self.hooks(session, lora)
        with stack:
            return self._plain.generate(ids, steps)

    async def gradients(self, session: Session, lora: LoRA, ids: Sequence[int]) -> Any:
        """Return those of the adapter's factors, in the order of `lora.parameters`."""
        stack, factors = await self.hooks(session, lora, grad=True)
        leaves = [factor for pair in factors.values() for factor in pair]
        with stack:
            loss = self._plain.run(ids, grad=True)[0, -1].logsumexp(-1)
            return torch.autograd.grad(loss, leaves)


async def test_in_one_forward_each_user_has_its_own_adapter(
    served: tuple[str, Path, list[str]], users: list[User]
) -> None:
    url, folder, modules = served
    async with connect(url, tensors="torch") as bare, connect(url) as bad:
        spoiled = await LoRA.create(bad, modules, rank=2, seed=9)
        async with bad.trace() as filling:
            for first, _ in spoiled.factors.values():
                (first * np.nan).keep(first.name)
        assert filling.result is not None
        with bare.trace(PROMPTS[0]) as without:
            without.logits = bare.model.unembed.output
        with bad.trace(PROMPTS[0]) as failing:
            failing.nothing = bad.model.embed.output[0].index_select(
                0, (bad.model.embed.output[0, :1, 0] * 0).long() + 10_000
            )
            spoiled.apply()
            failing.logits = bad.model.unembed.output
        traces = [record(*user, ids) for user, ids in zip(users, PROMPTS, strict=True)]
        results = await together(bare, record(bad, spoiled, PROMPTS[3]), failing, without, *traces)

    assert isinstance(results[1], errors.ExecutionError)
    adapted = Adapted(folder)
    found = [result for result in results[2:] if isinstance(result, Result)]
    assert len(found) == len(users) + 1
    assert max(result.statistics.groups for result in found) > 2
    plain = Plain(folder).run(PROMPTS[0])
    torch.testing.assert_close(found[0].logits, plain, rtol=0, atol=1e-9)
    for result, user, ids in zip(found[1:], users, PROMPTS, strict=True):
        wanted = await adapted.logits(*user, ids)
        torch.testing.assert_close(result.logits, wanted, rtol=0, atol=1e-9)
        assert not torch.allclose(wanted, Plain(folder).run(ids), atol=1e-3)


async def test_gradients_of_adapters_in_one_forward_are_those_of_each(
    served: tuple[str, Path, list[str]], users: list[User]
) -> None:
    traces = []
    for (session, lora), ids in zip(users, PROMPTS, strict=True):
        with session.trace(ids) as trace:
            lora.apply()
            session.model.unembed.output[0, -1].logsumexp(-1).backward()
            trace.gradients = [factor.grad for factor in lora.parameters]
        traces.append(trace)
    results = await together(users[0][0], *traces)

    assert max(result.statistics.groups for result in results) > 1
    adapted = Adapted(served[1])
    for result, user, ids in zip(results, users, PROMPTS, strict=True):
        for found, wanted in zip(
            result.gradients, await adapted.gradients(*user, ids), strict=True
        ):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)


async def test_generations_of_many_users_go_on_with_their_adapters(
    served: tuple[str, Path, list[str]], users: list[User]
) -> None:
    generations = []
    for (session, lora), ids in zip(users, PROMPTS, strict=True):
        generation = session.generate(ids, max_new_tokens=5, eos=False)
        with generation, generation.all():
            lora.apply()
        generations.append(generation)
    results = await asyncio.gather(*generations)

    adapted = Adapted(served[1])
    for result, user, ids in zip(results, users, PROMPTS, strict=True):
        assert list(result.new_ids) == await adapted.tokens(*user, ids, 5)
