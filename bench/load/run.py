"""The record of a load test, as JSON: what was asked of which server, and all that was seen."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
from msgspec.structs import replace

from bench.load.asking import Row
from bench.load.loops import Window
from bench.load.summary import Summary
from bench.machine import Machine, Source

#: Of the form of these files; another one is refused.
VERSION = 1

Loop = Literal["closed", "open", "replay"]


class RunError(ValueError):
    """A file is no record of a load test, or lacks what is asked of it."""


class ServerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The server and its model in its own words; `packed`: whether requests share forwards."""

    url: str
    version: str
    model: str
    kind: str
    dtype: str
    device: str
    tensor_parallel: int
    packed: bool
    layers: int
    hidden_size: int
    vocabulary: int


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for.

    Attributes:
        loop: who sends when.
        weights: of the scenarios; empty for a recording.
        think_s: mean pause of a user in a closed loop.
        window: of each level, in seconds.
        prompt_tokens: smallest and largest length.
        new_tokens: of generations.
        seed: of all that is random.
        slo_s: latency within which a result is good.
        keys: how many API keys the users shared; 0 if none was needed.
        recording, speed: what was replayed, and how many times as fast.
    """

    loop: Loop
    weights: dict[str, float]
    think_s: float
    window: Window
    prompt_tokens: tuple[int, int]
    new_tokens: int
    seed: int
    slo_s: float
    keys: int = 0
    recording: str | None = None
    speed: float = 1.0


def load_name(users: int, rate: float | None) -> str:
    """Return what a load is called: "8 users", "20/s"."""
    if rate is not None:
        return f"{rate:.3g}/s"
    return "1 user" if users == 1 else f"{users} users"


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """One load that was put on the server.

    Attributes:
        users: clients.
        rate: arrivals a second that were intended; None in a closed loop.
        window: when it measured.
        harness_cpu: seconds of processor time a second that the harness itself took; near 1, it is
            the harness that is slow.
        busy_before: cores of the harness's machine that were busy just before, with no request
            under way; None where that is not known.
        summary: what it comes to.
        requests: every request; None where they were left out.
    """

    users: int
    rate: float | None
    window: Window
    harness_cpu: float
    busy_before: float | None = None
    summary: Summary
    requests: list[Row] | None = None

    @property
    def name(self) -> str:
        """What tells it apart in a table: "8 users", "20/s"."""
        return load_name(self.users, self.rate)


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A load test: one level after the other on one server.

    Attributes:
        date: when it began, UTC.
        machine, versions, source: of the harness; the server's too where both are on one machine.
    """

    date: str
    settings: Settings
    server: ServerFacts
    machine: Machine
    versions: dict[str, str]
    source: Source
    levels: list[Level]
    version: int = VERSION


def write_run(path: Path, run: Run) -> None:
    """Write the record of a run.

    Raises:
        OSError: it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")


def read_run(path: Path) -> Run:
    """Return the record of a run.

    Raises:
        RunError: the file can't be read, or is none.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"can't read {path}: {error.strerror}") from None
    try:
        run = msgspec.json.decode(data, type=Run)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise RunError(f"{path} is no record of a load test: {error}") from None
    if run.version != VERSION:
        raise RunError(f"{path} is a record of version {run.version}; this reads {VERSION}")
    return run


def without_requests(run: Run) -> Run:
    """Return the same record without its single requests: a few kilobytes a level."""
    return replace(run, levels=[replace(level, requests=None) for level in run.levels])
