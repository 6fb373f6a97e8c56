"""`connect("local:...")`: a private server that says why it can't start, and never outlives us."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from ndif_client import blocking, connect, errors
from tests.conftest import MakeModel
from tests.integration.server.harness import gone

_HOLD = """
import asyncio, sys
from ndif_client import connect

async def main():
    async with connect("local:" + sys.argv[1]) as session:
        await session.trace("x", lambda m: m.lm_head.output)
        print("serving", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def folder(model_folder: MakeModel) -> Path:
    return model_folder("llama", torch.float32)


async def test_a_private_server_serves_and_ends_with_the_session(folder: Path) -> None:
    before = set(psutil.Process().children(recursive=True))

    async with connect(f"local:{folder}", serve_options=("--dtype", "float64")) as session:
        started = set(psutil.Process().children(recursive=True)) - before
        result = await session.trace("x", lambda m: m.lm_head.output)

    assert session.tree.dtype == "float64"
    assert result.value.dtype == torch.float64
    assert len(started) >= 2  # the coordinator and its shard
    assert gone(list(started))


def test_the_blocking_form_starts_one_too(folder: Path) -> None:
    with blocking.connect(f"local:{folder}") as session:
        assert session.trace("x", lambda m: m.lm_head.output).value.shape[0] == 1


async def test_a_server_that_can_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(errors.ServerStartError, match=r"config\.json|no such|not a model"):
        await connect(f"local:{tmp_path}")


async def test_a_server_that_dies_is_explained(folder: Path) -> None:
    async with connect(f"local:{folder}") as session:
        for child in psutil.Process().children():
            if "ndif_actor.cli" in " ".join(child.cmdline()):
                child.kill()
        with pytest.raises(errors.ConnectError, match="the private server has ended"):
            await session.trace("x", lambda m: m.lm_head.output)


def test_a_killed_client_takes_its_server_with_it(folder: Path) -> None:
    client = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    try:
        assert client.stdout.readline() == "serving\n"
        family = psutil.Process(client.pid).children(recursive=True)
    finally:
        client.kill()
        client.wait()
        client.stdout.close()

    assert len(family) >= 2
    assert gone(family)
