"""What exactly the shards are to load, decided before anybody has imported torch.

So the shards begin to load while the coordinator still builds its own model without weights.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Literal, cast, get_args

import msgspec

from ndif_actor.errors import ModelError

DtypeName = Literal["float64", "float32", "bfloat16", "float16"]


class ModelChoice(msgspec.Struct, frozen=True):
    """A model with nothing left to decide: its folder, its dtype and the kind of device."""

    folder: str
    dtype: DtypeName
    device: Literal["cpu", "cuda"]


class _ModelConfig(msgspec.Struct):
    """The part of a config.json that is wanted here; `torch_dtype` is the older name."""

    dtype: str | None = None
    torch_dtype: str | None = None


def choose(folder: Path, dtype: str, device: str) -> ModelChoice:
    """Decide what "auto" means.

    Args:
        folder: the model's files.
        dtype: a name, or "auto" for the one its weights were stored in (float32 if it says none).
        device: "cpu", "cuda", or "auto" for CUDA where there is a GPU and torch can use it.

    Raises:
        ModelError: the folder has no config.json, or names a dtype that can't be served.
    """
    chosen = stored_dtype(folder) if dtype == "auto" else dtype
    if chosen not in get_args(DtypeName):
        raise ModelError(f"the weights of {folder} are {chosen}; give --dtype float32 or another")
    on_gpu = device == "cuda" or (device == "auto" and has_usable_gpu())
    return ModelChoice(str(folder), cast(DtypeName, chosen), "cuda" if on_gpu else "cpu")


def stored_dtype(folder: Path) -> str:
    """Return the dtype that config.json says the weights were stored in.

    Raises:
        ModelError: there is no config.json, or it can't be read.
    """
    file = folder / "config.json"
    try:
        config = msgspec.json.decode(file.read_bytes(), type=_ModelConfig)
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"{file} can't be read: {error}") from None
    return config.dtype or config.torch_dtype or "float32"


def has_usable_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, and an installed torch that is not CPU-only."""
    if metadata.version("torch").endswith("+cpu"):
        return False
    import pynvml

    try:
        pynvml.nvmlInit()
        return bool(pynvml.nvmlDeviceGetCount() > 0)
    except pynvml.NVMLError:
        return False
