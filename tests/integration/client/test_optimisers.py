"""Optimisers do what torch's do, also where a training loop is not the simplest one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from ndif_client import Session, connect, errors, ops, optim
from tests.conftest import MakeModel
from tests.integration.server.harness import running

START = torch.tensor([0.5, -1.0, 2.0, 0.25])
TARGETS = [torch.tensor([1.0, 0.0, 3.0, -1.0]) * k for k in range(1, 7)]

OPTIMISERS: list[tuple[Any, Any, dict[str, Any]]] = [
    (optim.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.2}),
    (optim.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "maximize": True}),
    (optim.Adam, torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
    (optim.AdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
]
every_optimiser = pytest.mark.parametrize(
    ("ours", "theirs", "options"), OPTIMISERS, ids=range(len(OPTIMISERS))
)


@pytest.fixture(scope="module")
def url(model_folder: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("optimisers") / "log"
    with running(model_folder("llama", torch.float32), log, "--dtype", "float32") as server:
        yield server.url


@pytest.fixture
async def session(url: str) -> AsyncIterator[Session]:
    async with connect(url, tensors="torch") as session:
        yield session


def loss_of(weight: Any, target: torch.Tensor) -> Any:
    return ((weight - target) ** 4).sum() / 10


def trained(theirs: Any, options: dict[str, Any], targets: list[torch.Tensor]) -> torch.Tensor:
    weight = START.clone().requires_grad_()
    optimiser = theirs([weight], **options)
    for target in targets:
        optimiser.zero_grad()
        loss_of(weight, target).backward()
        optimiser.step()
    return weight.detach()


def step(session: Session, weight: Any, optimiser: Any, target: torch.Tensor) -> Any:
    with session.trace() as trace:
        loss_of(weight, target).backward()
        optimiser.step()
    return trace


@every_optimiser
async def test_options_mean_what_they_mean_to_torch(
    session: Session, ours: Any, theirs: Any, options: dict[str, Any]
) -> None:
    weight = await session.upload(START, "weight")
    optimiser = ours([weight], **options)
    for target in TARGETS:
        await step(session, weight, optimiser, target)
    torch.testing.assert_close(await session.fetch(weight), trained(theirs, options, TARGETS))


@every_optimiser
async def test_a_step_that_failed_or_was_never_sent_has_not_happened(
    session: Session, ours: Any, theirs: Any, options: dict[str, Any]
) -> None:
    weight = await session.upload(START, "weight")
    optimiser = ours([weight], **options)
    for number, target in enumerate(TARGETS):
        if number % 3 == 0:
            with session.trace() as failing:
                loss_of(weight, target).backward()
                optimiser.step()
                far = (weight[:1] * 0).long() + 999
                failing.lost = weight.index_select(0, far)
            with pytest.raises(errors.ExecutionError):
                await failing
            await step(session, weight, optimiser, target).explain()
        await step(session, weight, optimiser, target)
    torch.testing.assert_close(await session.fetch(weight), trained(theirs, options, TARGETS))


@every_optimiser
async def test_steps_that_are_sent_together_come_one_after_another(
    session: Session, ours: Any, theirs: Any, options: dict[str, Any]
) -> None:
    weight = await session.upload(START, "weight")
    optimiser = ours([weight], **options)
    await asyncio.gather(*(step(session, weight, optimiser, target) for target in TARGETS))
    torch.testing.assert_close(await session.fetch(weight), trained(theirs, options, TARGETS))


@every_optimiser
async def test_training_goes_on_in_another_session(
    session: Session, url: str, tmp_path: Path, ours: Any, theirs: Any, options: dict[str, Any]
) -> None:
    weight = await session.upload(START, "weight")
    optimiser = ours([weight], **options)
    for target in TARGETS[:3]:
        await step(session, weight, optimiser, target)
    held = await session.held_values()
    state = {key: handle for key, handle in optimiser.state.items() if handle.name in held}
    await session.download({"weight": weight, **state}, tmp_path / "checkpoint.safetensors")

    async with connect(url, tensors="torch") as other:
        found = await other.upload_file(tmp_path / "checkpoint.safetensors", "")
        again = ours([found["weight"]], **options, state=found)
        for target in TARGETS[3:]:
            await step(other, found["weight"], again, target)
        torch.testing.assert_close(
            await other.fetch(found["weight"]), trained(theirs, options, TARGETS)
        )


async def test_gradients_of_several_backwards_add_up(session: Session) -> None:
    wanted = [START.clone().requires_grad_() for _ in range(2)]
    theirs = torch.optim.SGD(wanted, lr=0.1)
    for target in TARGETS[:2]:
        loss_of(wanted[0], target).backward()
    loss_of(wanted[1], TARGETS[2]).backward()
    norm = clip_grad_norm_(wanted, 1.5)
    theirs.step()

    weights = [await session.upload(START, name) for name in ("first", "second")]
    ours = optim.SGD(weights, lr=0.1)
    async with session.trace() as trace:
        loss_of(weights[0], TARGETS[5]).backward()
        ours.zero_grad()
        for target in TARGETS[:2]:
            loss_of(weights[0], target).backward()
        loss_of(weights[1], TARGETS[2]).backward()
        trace.norm = ours.clip_grad_norm_(1.5)
        ours.step()
    torch.testing.assert_close(trace.result.norm, norm)
    for weight, own in zip(weights, wanted, strict=True):
        torch.testing.assert_close(await session.fetch(weight), own.detach())


async def test_groups_have_rates_of_their_own(session: Session) -> None:
    wanted = [START.clone().requires_grad_() for _ in range(2)]
    theirs = torch.optim.Adam([{"params": [wanted[0]], "lr": 0.5}, {"params": [wanted[1]]}], lr=0.1)
    weights = [await session.upload(START, name) for name in ("first", "second")]
    ours = optim.Adam([{"params": [weights[0]], "lr": 0.5}, {"params": [weights[1]]}], lr=0.1)
    for number, target in enumerate(TARGETS):
        if number == 3:
            theirs.param_groups[0]["lr"] = ours.param_groups[0]["lr"] = 0.2
        theirs.zero_grad()
        (loss_of(wanted[0], target) + loss_of(wanted[1], target)).backward()
        theirs.step()
        with session.trace() as trace:
            (loss_of(weights[0], target) + loss_of(weights[1], target)).backward()
            ours.step()
        await trace
    for weight, own in zip(weights, wanted, strict=True):
        torch.testing.assert_close(await session.fetch(weight), own.detach())


async def test_a_gradient_may_be_changed_before_the_step_and_looked_at_after_it(
    session: Session,
) -> None:
    weight = await session.upload(START, "weight")
    sgd = optim.SGD([weight], lr=1.0)
    for _ in range(2):
        async with session.trace() as trace:
            loss_of(weight, TARGETS[0]).backward()
            weight.grad = weight.grad.clamp(-0.1, 0.1)
            before = weight.clone()
            sgd.step()
            trace.gradient = weight.grad
            trace.moved = before - weight
        torch.testing.assert_close(trace.result.moved, trace.result.gradient)
        assert float(trace.result.gradient.abs().max()) == pytest.approx(0.1)


async def test_what_was_stepped_may_be_changed_again(session: Session) -> None:
    weight = await session.upload(START, "weight")
    sgd = optim.SGD([weight], lr=0.1)
    async with session.trace() as trace:
        for _ in range(2):
            sgd.zero_grad()
            loss_of(weight, TARGETS[0]).backward()
            sgd.step()
            (weight / weight.norm()).keep("weight")
    own = START.clone()
    for _ in range(2):
        own.requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(own, TARGETS[0]), own)
        own = own.detach() - 0.1 * gradient
        own /= own.norm()
    torch.testing.assert_close(await session.fetch(weight), own)
    assert trace.result is not None


async def test_what_an_optimiser_can_not_be_is_refused(session: Session) -> None:
    weight = await session.upload(START, "weight")
    for make, message in (
        (lambda: optim.Adam(weight), r"a list of held values: \[handle\]"),  # type: ignore[arg-type]
        (lambda: optim.SGD([weight], lr=-1.0), "not negative"),
        (lambda: optim.Adam([weight], betas=(1.0, 0.9)), "below 1"),
        (lambda: optim.SGD([]), "needs values to change"),
    ):
        with pytest.raises(errors.GraphError, match=message):
            make()
    other = await session.upload(START + 1, "other")
    with pytest.raises(errors.GraphError, match="no gradient of the held value 'other'"):
        async with session.trace():
            loss_of(weight, TARGETS[0]).backward()
            optim.SGD([weight, other]).step()
    with pytest.raises(errors.GraphError, match="no backward before this step"):
        async with session.trace():
            ops.zeros(1).save("x")
            optim.SGD([weight]).step()
