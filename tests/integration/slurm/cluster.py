"""A real Slurm: munged, slurmctld and one slurmd a node, and the commands to use it.

Owns the daemons and their state folder, and leaves nothing of either. On loopback the names of the
nodes do not resolve: jobs that span nodes need their address stated.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.integration.slurm.configuration import munge_flags, write_configuration
from tests.integration.slurm.hosts import THIS_HOST, Host, two_emulated_hosts

#: Searched in PATH and in /usr/sbin, where Debian puts the daemons.
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "ip")

_SEARCH_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


class SlurmError(AssertionError):
    """A daemon did not come up, or a Slurm command failed."""


def missing_programs() -> list[str]:
    """Return the names of the programs that are needed and not installed."""
    return [name for name in _PROGRAMS if shutil.which(name, path=_SEARCH_PATH) is None]


@contextlib.contextmanager
def cluster_on_loopback(nodes: int) -> Iterator[SlurmCluster]:
    """Run a cluster of so many nodes, all of them this machine."""
    with _state_folder() as folder:
        hosts = {f"n{index + 1}": THIS_HOST for index in range(nodes)}
        with SlurmCluster(folder, hosts).running() as cluster:
            yield cluster


@contextlib.contextmanager
def cluster_of_two_hosts() -> Iterator[SlurmCluster]:
    """Run a cluster of two emulated hosts, each with its own address and name.

    Raises:
        OSError: this machine does not let us emulate them.
    """
    with (
        _state_folder() as folder,
        two_emulated_hosts(folder) as hosts,
        SlurmCluster(folder, {host.name: host for host in hosts}).running() as cluster,
    ):
        yield cluster


@contextlib.contextmanager
def _state_folder() -> Iterator[Path]:
    # Not pytest's folder: the path of a unix socket has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)  # munge wants its socket's folder open to all
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


class SlurmCluster:
    """The daemons of one cluster, and the commands to use it.

    Attributes:
        folder: its state, logs and configuration.
        nodes: its machines by node name; the first one runs slurmctld.
        variables: what every process of this cluster has in its environment.
    """

    def __init__(self, folder: Path, nodes: Mapping[str, Host]) -> None:
        self.folder = folder
        self.nodes = nodes
        self.head = next(iter(nodes.values()))
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[SlurmCluster]:
        """Run it for as long as the block lasts."""
        write_configuration(self.folder, self.nodes, free_ports(1 + len(self.nodes)))
        try:
            self._start()
            yield self
        finally:
            self._stop()

    def command(self, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
        """Run one Slurm command on the head node and return its output.

        Args:
            arguments: program and arguments.
            environment: variables beside this process's own.

        Raises:
            SlurmError: it failed, or took longer than 30 s.
        """
        try:
            done = subprocess.run(
                self.head.command(self.folder, *arguments),
                env=_own_environment() | dict(environment or {}) | self.variables,
                cwd=self.folder,
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise SlurmError(f"{arguments} took longer than 30 s\n{self.logs()}") from None
        if done.returncode:
            raise SlurmError(f"{arguments} ended with {done.returncode}: {done.stderr}")
        return (done.stdout + done.stderr).strip()

    def submit(self, script: Path, *flags: str, environment: Mapping[str, str]) -> int:
        """Submit a script with sbatch; return the job's number."""
        output = self.command("sbatch", "--parsable", *flags, str(script), environment=environment)
        return int(output.splitlines()[-1])

    def job(self, number: int) -> dict[str, str]:
        """Return what `scontrol show job` says, by field name."""
        record = self.command("scontrol", "show", "job", str(number))
        return dict(re.findall(r"(\w+)=(\S*)", record))

    def has_ended(self, number: int) -> bool:
        """Say whether a job has ended, its clean-up included."""
        alive = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
        return self.job(number)["JobState"] not in alive

    def wait(self, what: str, timeout_s: float, condition: Callable[[], bool]) -> None:
        """Wait for a condition, while the daemons live.

        Raises:
            SlurmError: it did not come true in time, or a daemon ended.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if dead:
                raise SlurmError(f"ended by itself: {dead}\n{self.logs()}")
            if time.monotonic() > deadline:
                raise SlurmError(f"waited {timeout_s:.0f} s for {what}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """Return the end of every daemon's log."""
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-3000:]}" for f in files)

    def _start(self) -> None:
        """Start all daemons, and wait until every node is idle."""
        self._start_daemon(THIS_HOST, "munged", *munge_flags(self.folder))
        self.wait("munged's socket", 10, (self.folder / "munge.socket").exists)
        self._start_daemon(self.head, "slurmctld", "-D", "-c")
        for name, host in self.nodes.items():
            self._start_daemon(host, "slurmd", "-D", "-N", name)
        self.wait(f"{len(self.nodes)} idle nodes", 20, self._all_idle)

    def _stop(self) -> None:
        """Cancel all jobs, then end the daemons, last started first."""
        with contextlib.suppress(SlurmError):  # they may not have come up
            for job in self.command("squeue", "--noheader", "--format=%A").split():
                self.command("scancel", job)
            self.wait("an empty queue", 15, lambda: not self.command("squeue", "--noheader"))
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start_daemon(self, host: Host, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}.out").open("ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    host.command(self.folder, program, *arguments),
                    env=_own_environment() | self.variables | {"PATH": _SEARCH_PATH},
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # a Ctrl-C at pytest is not for them
                )
            )

    def _all_idle(self) -> bool:
        try:
            idle = self.command("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N")
        except SlurmError:
            return False  # slurmctld does not listen yet
        return sorted(idle.split()) == sorted(self.nodes)


def free_ports(count: int) -> list[int]:
    """Return port numbers that nobody used a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _own_environment() -> dict[str, str]:
    """This process's variables, less those of a Slurm job that it may itself run in."""
    foreign = ("SLURM", "SBATCH", "SRUN")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
