"""Models for all tests, made or fetched once per session."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from ndif_actor.engine import checkpoint
from ndif_actor.engine.cpu import kernel_environment
from ndif_actor.engine.engine import Engine
from tests.models import make_model
from tests.oracle import Oracle

#: Makes the folder of a random model: family and dtype in, folder out.
MakeModel = Callable[..., Path]
#: Loads a random model, once: family and dtype (float64 unless told otherwise) in.
LoadEngine = Callable[..., Engine]
LoadOracle = Callable[..., Oracle]

# As in a shard: without it, the bits of a matrix product depend on where its operands lie.
os.environ.update(kernel_environment("float32"))
# The models are so small that a second thread costs more than it computes.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """A function from family (and dtype) to the folder of such a random model."""
    folder = tmp_path_factory.mktemp("models")

    def make(family: str, dtype: torch.dtype = torch.float32) -> Path:
        return make_model(folder, family, dtype)

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the demo model, SmolLM2-135M-Instruct."""
    return checkpoint.resolve("demo", progress=False)


@pytest.fixture(scope="session")
def load_engine(model_folder: MakeModel) -> LoadEngine:
    """A function from family and dtype to an engine alone on one CPU."""

    @cache
    def load(family: str, dtype: torch.dtype = torch.float64) -> Engine:
        folder = model_folder(family, dtype)
        name = str(dtype).removeprefix("torch.")
        return Engine.load(
            folder, dtype=name, device="cpu", rank=0, world_size=1, cache_bytes=1 << 24
        )

    return load


@pytest.fixture(scope="session")
def load_oracle(model_folder: MakeModel) -> LoadOracle:
    """A function from family and dtype to plain transformers with the same weights."""

    @cache
    def load(family: str, dtype: torch.dtype = torch.float64) -> Oracle:
        return Oracle(model_folder(family, dtype), dtype)

    return load
