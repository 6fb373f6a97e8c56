"""Recorded requests: a file of what was asked, by whom and when, to be sent again.

Two forms, by the name's end: `.jsonl` has a header line and a line for each request, to be read and
written by people and scripts; `.msgpack` is one message, smaller and quicker. Either holds data
alone: nothing of it is executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from bench.load.asking import Planned
from bench.load.scenarios import SCENARIOS, Request, Sizes

#: Of the form of these files; another one is refused.
VERSION = 1

_SUFFIXES = (".jsonl", ".msgpack")


class RecordingError(ValueError):
    """A recording can't be read or written, or does not fit the served model."""


class Header(msgspec.Struct, frozen=True):
    """First line of a recording: the form's version, and the model it was made with."""

    version: int
    model: str = ""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One request: seconds from the start, the user's number, and what is asked."""

    at_s: float
    user: int
    request: Request


class Recording(msgspec.Struct, frozen=True):
    """A whole recording."""

    header: Header
    requests: list[Entry]


def check_name(path: Path) -> None:
    """Check that a recording can have this name.

    Raises:
        RecordingError: it can't.
    """
    if path.suffix not in _SUFFIXES:
        raise RecordingError(f"{path}: the name of a recording ends with {' or '.join(_SUFFIXES)}")


def write_recording(path: Path, planned: Sequence[Planned], model: str) -> None:
    """Write requests to a file, in the order of their times.

    Raises:
        RecordingError: the name has another end.
        OSError: it can't be written.
    """
    check_name(path)
    entries = [
        Entry(at_s=round(one.at_s, 6), user=one.user, request=one.request)
        for one in sorted(planned, key=lambda one: one.at_s)
    ]
    header = Header(VERSION, model)
    if path.suffix == ".msgpack":
        path.write_bytes(msgspec.msgpack.encode(Recording(header, entries)))
    else:
        path.write_bytes(msgspec.json.Encoder().encode_lines([header, *entries]))


def read_recording(path: Path) -> list[Planned]:
    """Return the requests of a file, in the order of their times.

    Raises:
        RecordingError: it can't be read, or is no recording, or an empty one.
    """
    check_name(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordingError(f"can't read {path}: {error.strerror}") from None
    try:
        found = _decode_lines(data) if path.suffix == ".jsonl" else _decode(data)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise RecordingError(f"{path} is no recording of a load test: {error}") from None
    if found.header.version != VERSION:
        raise RecordingError(
            f"{path} is a recording of version {found.header.version}; this reads {VERSION}"
        )
    if not found.requests:
        raise RecordingError(f"{path} has no request")
    planned = [Planned(entry.at_s, entry.user, entry.request) for entry in found.requests]
    return sorted(planned, key=lambda one: one.at_s)


def check_fit(planned: Sequence[Planned], sizes: Sizes) -> None:
    """Check that the served model can be asked all this.

    Raises:
        RecordingError: naming the first request that it can't.
    """
    for number, one in enumerate(planned, start=1):
        request = one.request
        if request.scenario not in SCENARIOS:
            raise RecordingError(
                f"request {number} is of scenario {request.scenario!r}; there are "
                f"{', '.join(SCENARIOS)}"
            )
        if one.at_s < 0 or one.user < 0:
            raise RecordingError(f"request {number} has a negative time or user")
        if not 0 <= request.layer < sizes.layers:
            raise RecordingError(
                f"request {number} is about layer {request.layer}; this model has {sizes.layers}"
            )
        largest = max((*request.tokens, *request.other), default=0)
        if largest >= sizes.vocabulary:
            raise RecordingError(
                f"request {number} has token {largest}; this model knows {sizes.vocabulary}"
            )


def hurried(planned: Sequence[Planned], speed: float) -> list[Planned]:
    """Return the same requests with all times divided by `speed`."""
    return [replace(one, at_s=one.at_s / speed) for one in planned]


def _decode(data: bytes) -> Recording:
    return msgspec.msgpack.decode(data, type=Recording)


def _decode_lines(data: bytes) -> Recording:
    first, _, rest = data.partition(b"\n")
    header = msgspec.json.decode(first, type=Header)
    return Recording(header, msgspec.json.Decoder(Entry).decode_lines(rest))
