"""Which line of the user's program is running: file, line number and text.

Frames of this package, and of what calls it back on the user's behalf, are passed over.
"""

from __future__ import annotations

import linecache
import sys
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


def _sendable(text: str) -> str:
    """Replace what UTF-8 can't say: file names may hold lone surrogates."""
    return text.encode(errors="replace").decode()
