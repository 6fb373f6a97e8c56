"""Models for all tests, made or fetched once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ndif_actor.engine import checkpoint
from tests.models import make_model

#: Makes the folder of a random model: family and dtype in, folder out.
MakeModel = Callable[..., Path]


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
