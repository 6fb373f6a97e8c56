"""The result of a benchmark: a JSON file that can be read years later, and a table for now."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from bench.machine import Machine, Source, describe_machine, describe_source, versions
from bench.measure import Figure

_RESULTS = Path(__file__).resolve().parent / "results"

#: Above this load average at the start, something else was computing too.
_BUSY_LOAD = 0.5


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about one run of one benchmark.

    Attributes:
        settings: what it was asked to do.
        figures: the outcome.
        observations: what was seen round by round, in seconds unless the name says otherwise.
    """

    benchmark: str
    date: str
    command: list[str]
    machine: Machine
    versions: dict[str, str]
    source: Source
    settings: dict[str, Any]
    figures: list[Figure]
    observations: dict[str, Any]


class Recorder:
    """Notes the state of the machine when a benchmark begins, and writes the record at its end."""

    def __init__(self, benchmark: str, settings: dict[str, Any]) -> None:
        self._benchmark = benchmark
        self._settings = settings
        self._began = datetime.now(UTC).isoformat(timespec="seconds")
        self._machine = describe_machine()

    def finish(
        self, figures: list[Figure], observations: dict[str, Any], out: Path | None = None
    ) -> Path:
        """Write the record, print its figures, and return where it is.

        Args:
            figures: the outcome.
            observations: see `Record`.
            out: the file to write; `bench/results/<benchmark>.json` by default.
        """
        record = Record(
            benchmark=self._benchmark,
            date=self._began,
            command=["python", "-m", _module(), *sys.argv[1:]],
            machine=self._machine,
            versions=versions(),
            source=describe_source(),
            settings=self._settings,
            figures=figures,
            observations=observations,
        )
        path = out or _RESULTS / f"{self._benchmark}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
        _show(record, path)
        return path


def _module() -> str:
    main = sys.modules["__main__"].__spec__
    return sys.argv[0] if main is None else main.name


def _show(record: Record, path: Path) -> None:
    table = Table(title=record.benchmark)
    table.add_column("figure")
    table.add_column("median", justify="right")
    table.add_column("middle half", justify="right")
    table.add_column("target")
    for figure in record.figures:
        seen = figure.spread
        median = f"{seen.median:.3g} {figure.unit}"
        half = f"{seen.lower_quartile:.3g} to {seen.upper_quartile:.3g}"
        table.add_row(figure.name, median, half, _outcome(figure))
    console = Console()
    console.print(table)
    meanings: dict[str, list[str]] = {}
    for figure in record.figures:
        meanings.setdefault(figure.meaning, []).append(figure.name)
    for meaning, names in meanings.items():
        who = "all" if len(meanings) == 1 else ", ".join(names)
        console.print(f"{who}: {meaning}", highlight=False)
    if record.machine.load > _BUSY_LOAD:
        console.print(f"the load average was {record.machine.load:.1f} when this began: not alone")
    console.print(f"written to {path}")


def _outcome(figure: Figure) -> str:
    if figure.target is None:
        return ""
    return f"{figure.target}: {'met' if figure.met else 'NOT MET'}"
