"""How long `import ndif_client` takes in a fresh interpreter, beside one that imports nothing.

The client promises to need neither torch nor transformers; a run in which either was imported is
an error, not a figure.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from bench.measure import Figure, alternate, differences, spread
from bench.record import Recorder

_TARGET_S = 0.3

#: Prints the seconds of the import and the heavy modules it brought in.
_IMPORT = """
import time
began = time.perf_counter()
import ndif_client
elapsed = time.perf_counter() - began
import sys
print(elapsed, *sorted({"torch", "transformers"} & set(sys.modules)))
"""

#: Lines of the list of slowest imports.
_SLOWEST = 15


def main(
    rounds: Annotated[int, typer.Option(help="Fresh interpreters of each kind.")] = 21,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Measure the import of ndif_client in fresh interpreters, files already in memory."""
    recorder = Recorder("client_import", {"rounds": rounds})
    seen = alternate(
        {
            "import": lambda _: _import_s(),
            "with the client": lambda _: _process_s("import ndif_client"),
            "bare": lambda _: _process_s("pass"),
        },
        rounds,
        warmups=2,
    )
    imported = spread(seen["import"])
    longer = spread(differences(seen["with the client"], seen["bare"]))
    figures = [
        Figure(
            name="import",
            meaning="time of the import statement",
            unit="s",
            spread=imported,
            target=f"< {_TARGET_S} s",
            met=imported.median < _TARGET_S,
        ),
        Figure(
            name="process",
            meaning="time from start to exit, less that of an interpreter that imports nothing",
            unit="s",
            spread=longer,
        ),
    ]
    recorder.finish(figures, seen | {"slowest imports": _slowest()}, out)


def _import_s() -> float:
    """Return the seconds of the import in a fresh interpreter."""
    seconds, *heavy = _run(_IMPORT).stdout.split()
    if heavy:
        raise SystemExit(f"importing ndif_client imported {' and '.join(heavy)}")
    return float(seconds)


def _process_s(program: str) -> float:
    """Return the seconds an interpreter takes from start to exit."""
    began = time.perf_counter()
    _run(program)
    return time.perf_counter() - began


def _slowest() -> list[str]:
    """Return the slowest imports as `-X importtime` prints them: own and total microseconds."""
    lines = [
        line.removeprefix("import time:")
        for line in _run("import ndif_client", "-X", "importtime").stderr.splitlines()
        if line.startswith("import time:") and "[us]" not in line
    ]
    return sorted(lines, key=lambda line: -int(line.split("|")[0]))[:_SLOWEST]


def _run(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True)


if __name__ == "__main__":
    typer.run(main)
