"""Programs of researchers on several families, alone and among others, against plain hooks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch

from ndif_client import Session, connect, errors
from ndif_client.results import Result
from tests.conftest import MakeModel
from tests.integration.client import (  # noqa: F401 - each adds its own
    attention_programs,
    control_programs,
    generation_programs,
)
from tests.integration.client.plain import Plain
from tests.integration.client.programs import EIFFEL, PROGRAMS, Values
from tests.integration.server.harness import Server, running

#: A family and its number of shards.
SERVED = [("gpt2", 1), ("gemma3", 1), ("qwen3_moe", 2)]


@pytest.fixture(scope="module", params=SERVED, ids=lambda served: "{}-tp{}".format(*served))
def served(
    request: pytest.FixtureRequest,
    model_folder: MakeModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Server, dict[str, Values]]]:
    """A running server, and what its programs are to save."""
    family, shards = request.param
    folder = model_folder(family, torch.float64)
    plain = Plain(folder)
    wanted = {name: expected(plain) for name, _, expected in PROGRAMS}
    log = tmp_path_factory.mktemp("programs") / "log"
    with running(folder, log, "--dtype", "float64", "--tp", str(shards)) as server:
        yield server, wanted


@pytest.fixture
async def session(served: tuple[Server, Any]) -> AsyncIterator[Session]:
    async with connect(served[0].url, tensors="torch") as session:
        yield session


async def test_alone_every_program_saves_what_plain_hooks_do(
    session: Session, served: tuple[Server, dict[str, Values]]
) -> None:
    for name, record, _ in PROGRAMS:
        assert_same(name, await record(session), served[1][name])


async def test_among_neighbours_that_break_things_every_program_still_does(
    session: Session, served: tuple[Server, dict[str, Values]]
) -> None:
    async with connect(served[0].url) as other:
        ours = [record(session) for _, record, _ in PROGRAMS]
        theirs = [_spoiled(other), _late_failure(other), _spoiled_gradients(other)]
        results = await asyncio.gather(*ours, *theirs, return_exceptions=True)

    for (name, _, _), result in zip(PROGRAMS, results, strict=False):
        assert isinstance(result, Result), f"{name}: {result}"
        assert_same(name, result, served[1][name])
    shared = [result.statistics.groups for result in results if isinstance(result, Result)]
    assert max(shared) > 1
    assert isinstance(results[-2], errors.ExecutionError)


def assert_same(name: str, result: Result, wanted: Values) -> None:
    assert set(result.keys()) == set(wanted), name
    for key, value in wanted.items():
        found = result[key]
        pairs = zip(found, value, strict=True) if isinstance(value, list) else [(found, value)]
        for mine, plain in pairs:
            got, place = torch.as_tensor(mine), f"{name}.{key}"
            assert got.shape == plain.shape, place
            assert torch.allclose(got, plain, rtol=0, atol=1e-9), place


def _spoiled(session: Session) -> Any:
    """Everything of this one is NaN."""
    with session.trace(EIFFEL) as trace:
        for layer in session.model.layers:
            layer.resid[:] = float("nan")
        trace.logits = session.model.output.logits
    return trace


def _late_failure(session: Session) -> Any:
    """This one fails in the midst of the forward, at an index that its values decide."""
    with session.trace(EIFFEL) as trace:
        stream = session.model.layers[1].resid
        index = (stream * 0).sum().long() + 10_000
        session.model.layers[1].resid[:] = 1e30
        trace.lost = stream[0].index_select(0, index.reshape(1))
    return trace


def _spoiled_gradients(session: Session) -> Any:
    """The gradients of this one are infinite."""
    with session.trace(EIFFEL) as trace:
        stream = session.model.layers[0].resid
        (session.model.output.logits.sum() * float("inf")).backward()
        trace.gradient = stream.grad
    return trace
