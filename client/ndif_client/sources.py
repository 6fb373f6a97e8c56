"""Which line of the user's program is running: file, line number and text.

Frames of this package, and of what calls it back on the user's behalf, are passed over.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ndif_client.wire.graph import MAX_TEXT, Source

#: Packages whose frames are never the user's.
_PASSED_OVER = frozenset(
    ("ndif_client", "torch", "numpy", "contextlib", "functools", "asyncio", "threading")
)

#: Characters kept of a line.
_MAX_LINE = 200


def user_frame() -> FrameType | None:
    """Return the innermost frame of the user's, or None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        if name.partition(".")[0] not in _PASSED_OVER:
            return frame
        frame = frame.f_back
    return None


def capture() -> Source:
    """Return the user's current line."""
    frame = user_frame()
    if frame is None:
        return Source("<unknown>", 0)
    return source_at(frame.f_code.co_filename, frame.f_lineno, frame)


def source_at(file: str, line: int, frame: FrameType) -> Source:
    """Return a line of the user's with its text, which notebooks keep in `linecache` too."""
    text = linecache.getline(file, line, frame.f_globals).strip()
    return Source(_sendable(file)[-MAX_TEXT:], line, _sendable(text)[:_MAX_LINE])


class Lines:
    """The lines that the nodes of one trace come from, each once.

    Attributes:
        sources: all of them, in the order they were met.
        at: the position in `sources` of the line of each node, by its number.
    """

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self.at: list[int] = []
        self._numbers: dict[tuple[str, int], int] = {}
        self._given: Source | None = None

    def __getitem__(self, node: int) -> Source:
        return self.sources[self.at[node]]

    @contextmanager
    def given(self, source: Source | None) -> Iterator[None]:
        """Within the block, nodes come from that line, whoever records them now."""
        previous, self._given = self._given, source
        try:
            yield
        finally:
            self._given = previous

    def note(self) -> None:
        """Note that the next node comes from the user's current line."""
        if (own := self._given) is not None:
            number = self._number((own.file, own.line), lambda: own)
        elif (frame := user_frame()) is None:
            number = self._number(("<unknown>", 0), lambda: Source("<unknown>", 0))
        else:
            key = (frame.f_code.co_filename, frame.f_lineno)
            number = self._number(key, lambda: source_at(*key, frame))
        self.at.append(number)

    def _number(self, key: tuple[str, int], make: Callable[[], Source]) -> int:
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.sources)
            self.sources.append(make())
        return number


def _sendable(text: str) -> str:
    """Replace what UTF-8 can't say: file names may hold lone surrogates."""
    return text.encode(errors="replace").decode()
