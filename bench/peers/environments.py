"""An environment for each peer, made from PyPI, so that none decides another's versions."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from ndif_actor.engine.checkpoint import cache_folder

_HERE = Path(__file__).resolve().parent
SCRIPTS = _HERE / "scripts"
_REQUIREMENTS = _HERE / "requirements"


def names() -> list[str]:
    """Return the environments there are requirements for."""
    return sorted(file.stem for file in _REQUIREMENTS.glob("*.txt"))


def python_of(name: str) -> Path | None:
    """Return the interpreter of an environment, or None where it is not installed."""
    found = _folder(name) / "bin" / "python"
    return found if (_folder(name) / _DONE).is_file() else None


def install(name: str) -> Path:
    """Make an environment anew and install what it needs.

    Raises:
        subprocess.CalledProcessError: pip could not.
    """
    folder = _folder(name)
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin" / "python"
    options = ["--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [python, "-m", "pip", "install", *options, "-r", _REQUIREMENTS / f"{name}.txt"],
        check=True,
        stdout=sys.stderr,
    )
    (folder / _DONE).touch()
    return python


#: Is there when everything has been installed.
_DONE = ".complete"


def _folder(name: str) -> Path:
    return cache_folder() / "peers" / name
