"""A process of its own that holds one object and calls its methods, one at a time.

What is compared runs in separate processes, so that neither sees the other's threads, settings or
caches; between calls a worker waits, using no processor.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Any

_held: Any = None


class Worker:
    """Runs `factory(*arguments)` in a fresh interpreter and keeps what it returns.

    Args:
        factory: a class or function at the top of a module that imports torch only inside it.
        arguments: for it.
    """

    def __init__(self, factory: Callable[..., Any], *arguments: Any) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._pool.submit(_hold, factory, arguments).result()

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Return what that method of the held object returns."""
        return self._pool.submit(_call, method, arguments, named).result()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown()


def _hold(factory: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _held  # noqa: PLW0603 - the one object of this process
    _held = factory(*arguments)


def _call(method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return getattr(_held, method)(*arguments, **named)
