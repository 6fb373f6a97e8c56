"""A model in shards shows, and takes, whole tensors everywhere: real processes, joined by gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import pytest
import torch

from tests.models import make_model

ROOT = Path(__file__).parents[3]

COMMON = ("hook_points", "writes", "experiments", "parameters", "module_calls")

TWO = [
    "layouts:llama",
    "layouts:phi3",
    *(f"{case}:{family}" for family in ("llama", "qwen3", "gemma", "phi3") for case in COMMON),
    *(f"{case}:qwen3_moe" for case in COMMON[:3]),
    *(f"gradients:{family}" for family in ("llama", "qwen3", "gemma", "phi3", "qwen3_moe")),
    "failures:llama",
    "conditions:llama",
    "held_values:llama",
    *(f"generations:{family}" for family in ("llama", "gemma3", "phi3")),
    "half_precision:llama",
]
THREE = [
    "layouts:qwen3_6",
    *(f"{case}:{family}" for family in ("llama6", "qwen3_6") for case in COMMON),
    "failures:llama6",
    "conditions:llama6",
    *(f"gradients:{family}" for family in ("llama6", "qwen3_6")),
    "generations:qwen3_6",
    "slices:llama6",
]


def run_shards(
    folder: Path, world_size: int, cases: Sequence[str], environment: Mapping[str, str]
) -> dict[str, str]:
    """Run the cases in `world_size` processes; return what went wrong in each."""
    command = [sys.executable, "-m", "tests.integration.engine.shard_process", str(folder), *cases]
    shards = []
    for rank in range(world_size):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        with (folder / f"{rank}.log").open("wb") as log:
            shards.append(
                subprocess.Popen(
                    command, cwd=ROOT, stdout=log, stderr=log,
                    env={**os.environ, **environment, **variables},
                )
            )  # fmt: skip
    try:
        statuses = [shard.wait(timeout=100) for shard in shards]
    finally:
        for shard in shards:
            shard.kill()
            shard.wait()
    logs = [(folder / f"{rank}.log").read_text()[-3000:] for rank in range(world_size)]
    assert not any(statuses), "\n".join(logs)
    return msgspec.json.decode((folder / "report.json").read_bytes(), type=dict[str, str])


def make_models(folder: Path, cases: Sequence[str]) -> None:
    for case in cases:
        name, _, family = case.partition(":")
        make_model(folder, family, torch.bfloat16 if name == "half_precision" else torch.float64)


@pytest.fixture(scope="module")
def report_of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in each case with two shards."""
    folder = tmp_path_factory.mktemp("two")
    make_models(folder, TWO)
    return run_shards(folder, 2, TWO, {})


@pytest.fixture(scope="module")
def report_of_three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in each case with three shards."""
    folder = tmp_path_factory.mktemp("three")
    make_models(folder, THREE)
    return run_shards(folder, 3, THREE, {})


@pytest.mark.parametrize("case", TWO)
def test_two_shards_equal_the_whole_model(case: str, report_of_two: dict[str, str]) -> None:
    assert report_of_two[case] == ""


@pytest.mark.parametrize("case", THREE)
def test_three_shards_equal_the_whole_model_though_widths_do_not_divide(
    case: str, report_of_three: dict[str, str]
) -> None:
    assert report_of_three[case] == ""


def test_smollm2_in_three_shards_equals_plain_transformers(smollm2: Path, tmp_path: Path) -> None:
    from ndif_actor.engine.cpu import kernel_environment

    (tmp_path / "smollm2-float32").symlink_to(smollm2)

    report = run_shards(tmp_path, 3, ["smollm2:smollm2"], kernel_environment("float32"))

    assert report == {"smollm2:smollm2": ""}
