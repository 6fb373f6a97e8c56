"""A peer in a process of its own, asked through its standard input; see `scripts/protocol.py`."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench.load.scenarios import Request
from bench.peers.environments import SCRIPTS

#: Seconds for its end, before it is killed.
_STOP_S = 20.0


class PeerError(Exception):
    """A peer could not do what it was asked."""


class Answers(msgspec.Struct, frozen=True):
    """Of each request of a round: the seconds it took, and some numbers of its result."""

    seconds: list[float]
    values: list[list[float]]


class Crowd(msgspec.Struct, frozen=True):
    """Of users who asked without pause: seconds each request took, and seconds in all."""

    latencies: list[float]
    seconds: float


class PeerProcess:
    """One peer with a model loaded.

    Args:
        python: of its environment.
        script: the name of its module in `scripts/`.
        folder, dtype: of the model.

    Raises:
        PeerError: it could not be loaded.
    """

    def __init__(self, python: Path, script: str, folder: str, dtype: str) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [python, SCRIPTS / "protocol.py", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            told = self._ask({"folder": folder, "dtype": dtype})
        except PeerError:
            self.close()
            raise
        self.versions: dict[str, str] = told["versions"]

    def round(self, requests: Sequence[Request]) -> Answers:
        """Run requests one after another.

        Raises:
            PeerError: one of them failed.
        """
        return self.run(_plain(requests))

    def run(self, requests: Sequence[Mapping[str, Any]]) -> Answers:
        """Run requests of whatever kind the script knows, one after another.

        Raises:
            PeerError: one of them failed.
        """
        return msgspec.convert(self._ask({"requests": requests}), Answers)

    def crowd(self, requests: Sequence[Sequence[Request]], seconds: float) -> Crowd:
        """Let users ask without pause, each again and again the requests of his own.

        Raises:
            PeerError: one of them failed.
        """
        own = [_plain(each) for each in requests]
        wanted = {"users": len(own), "seconds": seconds, "requests": own}
        return msgspec.convert(self._ask({"crowd": wanted}), Crowd)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise PeerError(f"it ended by itself; its last words:\n{self._log.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer


def _plain(requests: Sequence[Request]) -> list[dict[str, Any]]:
    # With all fields, also those that have their defaults: the scripts don't know these.
    return [{name: getattr(one, name) for name in one.__struct_fields__} for one in requests]
