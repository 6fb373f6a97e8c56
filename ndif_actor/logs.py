"""Structured logs on stderr: pretty on a terminal, one JSON object a line elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any, Literal, TextIO, cast

import structlog

LogFormat = Literal["auto", "json", "console"]


class _LastingStderr:
    """stderr for a server that goes on, and ends in order, when nobody reads its log any more."""

    def write(self, text: str) -> int:
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.flush()


def configure_logs(log_format: LogFormat, level: str, **context: Any) -> None:
    """Set up structlog and the standard library's logging, for this whole process.

    Args:
        log_format: "auto" is "console" where stderr is a terminal, else "json".
        level: the lowest level that is written, such as "info".
        context: put on every line, such as `rank=0`.
    """
    stderr = _LastingStderr()
    number = logging.getLevelNamesMapping()[level.upper()]
    pretty = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    final: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
        if pretty
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, *final],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, stderr)),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(**context)
    handler = logging.StreamHandler(stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    # Libraries speak from warning on; whoever wants their chatter asks for debug.
    logging.basicConfig(
        handlers=[handler], level=number if number <= logging.DEBUG else logging.WARNING, force=True
    )
