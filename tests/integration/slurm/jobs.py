"""Servers as Slurm jobs: submit a script of deploy/slurm, follow it, end it."""

from __future__ import annotations

import random
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

from tests.integration.slurm.cluster import SlurmCluster
from tests.integration.slurm.processes import processes_with, wait_for_none

SCRIPTS = Path(__file__).parents[3] / "deploy" / "slurm"

#: What a job needs to find this environment's `ndif-actor`, and to stay on loopback: the nodes'
#: names do not resolve here.
_ON_THIS_MACHINE = {
    "NDIF_ACTOR_HOST": "127.0.0.1",
    "SITE_INTERFACE": "lo",
    "OMP_NUM_THREADS": "1",
}

#: Submits a script by name, with flags for sbatch and variables for the script.
Submit = Callable[..., "ServerJob"]


def _free_pair() -> int:
    """Return a port that is free, as is the next: none of those that connections are given."""
    while True:
        port = random.randrange(15_000, 31_000, 2)
        with socket.socket() as first, socket.socket() as second, suppress(OSError):
            first.bind(("", port))
            second.bind(("", port + 1))
            return port


class ServerJob:
    """One submitted server.

    Attributes:
        number: Slurm's job id.
        address_file: where the script says the URL will be.
        secret_folder: where the secret of the run is kept.
    """

    def __init__(self, cluster: SlurmCluster, number: int) -> None:
        self._cluster = cluster
        self.number = number
        self.address_file = cluster.folder / f"ndif-actor-{number}.url"
        self.secret_folder = cluster.folder / "run"

    @classmethod
    def submit(cls, cluster: SlurmCluster, script: str, *flags: str, **variables: str) -> ServerJob:
        """Submit `script` with flags of sbatch and variables of the script."""
        (cluster.folder / "logs").mkdir(exist_ok=True)
        environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "SITE_RUN_DIR": str(cluster.folder / "run"),
            "SITE_PORT": str(_free_pair()),
            **_ON_THIS_MACHINE,
            **variables,
        }
        return cls(cluster, cluster.submit(SCRIPTS / script, *flags, environment=environment))

    def wait_for_url(self, timeout_s: float = 90.0) -> str:
        """Wait until the server is ready; return its URL."""

        def appeared() -> bool:
            return self.address_file.exists() or self._cluster.has_ended(self.number)

        self._wait("the address file", timeout_s, appeared)
        assert self.address_file.exists(), (
            f"ended before it was ready:\n{self.output()}\n{self._cluster.logs()}"
        )
        return self.address_file.read_text().strip()

    def wait_for_output(self, text: str, timeout_s: float = 30.0) -> None:
        """Wait until the job's logs contain `text`."""
        self._wait(f"{text!r} in the output", timeout_s, lambda: text in self.output())

    def wait_for_end(self, timeout_s: float = 30.0) -> tuple[str, str]:
        """Wait until the job has ended; return its state and "exit code:signal"."""
        self._wait("the job's end", timeout_s, lambda: self._cluster.has_ended(self.number))
        record = self._cluster.job(self.number)
        return record["JobState"], record["ExitCode"]

    def reach_time_limit(self) -> None:
        """Send what `--signal=B:TERM@120` sends: TERM, to the batch script alone."""
        self._cluster.command("scancel", "--batch", "--signal=TERM", str(self.number))

    def cancel(self) -> None:
        """Cancel the job if it has not ended."""
        if not self._cluster.has_ended(self.number):
            self._cluster.command("scancel", str(self.number))
            self.wait_for_end()

    def shards(self) -> dict[str, int]:
        """Return the process id of the shard on each node; one a node is assumed."""
        found = {}
        for node in self._cluster.nodes:
            on_node = [*self._variables(), f"SLURMD_NODENAME={node}"]
            for pid in processes_with(on_node, containing="/ndif-actor shard"):
                found[node] = pid
        return found

    def wait_until_ready(self, url: str, timeout_s: float = 90.0) -> None:
        """Wait until the server says that it can run requests."""
        self._wait("readiness", timeout_s, lambda: _is_ready(url))

    def processes_left(self) -> list[str]:
        """Return the job's processes that are there although it has ended."""
        return wait_for_none(self._variables(), timeout_s=5.0)

    def secrets_left(self) -> list[Path]:
        """Return the secret files that are there."""
        return list(self.secret_folder.glob(f"{self.number}.*"))

    def output(self) -> str:
        """Return all that the job has logged."""
        files = sorted((self._cluster.folder / "logs").glob(f"*-{self.number}*.log"))
        return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')}" for f in files)

    def _variables(self) -> list[str]:
        variables = {"SLURM_JOB_ID": str(self.number), **self._cluster.variables}
        return [f"{name}={value}" for name, value in variables.items()]

    def _wait(self, what: str, timeout_s: float, condition: Callable[[], bool]) -> None:
        try:
            self._cluster.wait(what, timeout_s, condition)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5):
            return True
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
            raise
        return False
