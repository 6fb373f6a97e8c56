"""Several users of what only one may use at a time."""

from __future__ import annotations

import threading


def one_at_a_time(run):
    """Let several threads share a function that runs requests."""
    lock = threading.Lock()

    def locked(request):
        with lock:
            return run(request)

    return locked
