"""What "auto" means is decided from the model's files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ndif_actor.coordinator.choice import choose, stored_dtype
from ndif_actor.errors import ModelError


def model(folder: Path, **config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"torch_dtype": "float16", "hidden_size": 4}, "float16"),
        ({}, "float32"),
    ],
)
def test_the_stored_dtype_is_read_from_either_name(
    tmp_path: Path, config: dict[str, object], dtype: str
) -> None:
    assert stored_dtype(model(tmp_path, **config)) == dtype


def test_what_is_asked_for_wins(tmp_path: Path) -> None:
    choice = choose(model(tmp_path, dtype="bfloat16"), "float64", "cpu")

    assert (choice.dtype, choice.device, choice.folder) == ("float64", "cpu", str(tmp_path))


def test_weights_that_cannot_be_served_as_stored_name_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="float8_e4m3fn; give --dtype"):
        choose(model(tmp_path, dtype="float8_e4m3fn"), "auto", "cpu")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json can't be read"):
        choose(tmp_path, "auto", "cpu")
