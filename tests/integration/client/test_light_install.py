"""The client imports fast, without torch and transformers, and works without them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from tests.conftest import MakeModel
from tests.integration.server.harness import Server, running

_HEAVY = ("torch", "transformers", "rich", "aiohttp")

_WITHOUT_TORCH = """
import asyncio, sys
sys.modules["torch"] = sys.modules["transformers"] = None  # as if they were not installed
import numpy as np
from ndif_client import connect

async def main():
    async with connect(sys.argv[1]) as session:
        async with session.trace("text") as trace:
            hidden = session.model.model.layers[0].output.save()
            session.model.model.layers[1].output[:, -1] += np.ones(48, dtype=np.float32)
            top = session.model.lm_head.output[:, -1].topk(2).indices.save()
        assert isinstance(hidden.value, np.ndarray), type(hidden.value)
        print(hidden.value.dtype, hidden.value.shape, top.value.dtype)

if len(sys.argv) > 2:
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


@pytest.fixture(scope="module")
def server(model_folder: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("light") / "server.log"
    with running(model_folder("llama", torch.bfloat16), log) as server:
        yield server


def _python(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_client_imports_nothing_heavy() -> None:
    program = f"import sys, ndif_client; print([m for m in {_HEAVY} if m in sys.modules])"

    assert _python(program).strip() == "[]"


def test_importing_the_client_is_fast() -> None:
    program = (
        "import time; start = time.process_time(); import ndif_client; "
        "print(time.process_time() - start)"
    )
    best_s = min(float(_python(program)) for _ in range(3))

    assert best_s < 0.3


def test_results_are_numpy_where_torch_is_not_installed(server: Server) -> None:
    assert _python(_WITHOUT_TORCH, server.url) == "float32 (1, 4, 48) int64\n"


def test_the_client_works_on_uvloop(server: Server) -> None:
    assert _python(_WITHOUT_TORCH, server.url, "uvloop") == "float32 (1, 4, 48) int64\n"


def test_bfloat16_arrives_as_bfloat16(server: Server) -> None:
    from ndif_client import blocking

    with blocking.connect(server.url) as session:
        assert session.trace("x", lambda m: m.lm_head.output).value.dtype == torch.bfloat16
