"""How a peer is asked: lines of JSON on its standard input, one answer each on its standard output.

    python protocol.py plain_hooks

A peer is a module with `make(folder, dtype)`, which loads the model in that folder and returns a
function that runs a request, given as a dict, and returns what its user gets: an array, a list of
arrays or a list of ids. Its `PACKAGES` are those whose versions are told. Everything here runs in
the environment of the peer, so it knows nothing of this project.

The first line that comes says what to load; each later one is a round of requests, to be run one
after another, or a crowd of users who ask again as soon as they have an answer.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version

#: Numbers of an answer that are compared.
_COMPARED = 16


def main(name):
    """Load a peer and answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    first = json.loads(sys.stdin.readline())
    peer = importlib.import_module(name)
    run = peer.make(first["folder"], first["dtype"])
    print(json.dumps({"versions": _versions(peer.PACKAGES)}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = _crowd(run, **asked["crowd"]) if "crowd" in asked else _round(run, **asked)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


def _round(run, requests):
    seconds, values = [], []
    for request in requests:
        began = time.perf_counter()
        found = run(request)
        seconds.append(time.perf_counter() - began)
        values.append(_digest(found))
    return {"seconds": seconds, "values": values}


def _digest(found):
    """Return a few numbers of an answer, for comparing: the last ones of the last array."""
    if isinstance(found, list) and hasattr(found[-1], "reshape"):
        found = found[-1]
    if hasattr(found, "reshape"):
        return [float(number) for number in found.reshape(-1)[-_COMPARED:]]
    return [float(number) for number in found]


def _crowd(run, users, seconds, requests):
    """Let users ask one thing after another for so many seconds; each has requests of its own."""
    latencies = [[] for _ in range(users)]
    began = time.perf_counter()

    def ask(user):
        own, number = requests[user], 0
        while time.perf_counter() - began < seconds:
            sent = time.perf_counter()
            run(own[number % len(own)])
            latencies[user].append(time.perf_counter() - sent)
            number += 1

    threads = [threading.Thread(target=ask, args=(user,)) for user in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    return {"latencies": [one for own in latencies for one in own], "seconds": took}


def _versions(packages):
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


if __name__ == "__main__":
    main(sys.argv[1])
