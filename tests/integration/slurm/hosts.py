"""The machines that a test cluster consists of: this one several times, or emulated ones.

An emulated host is a network namespace with an address, a host name and an /etc/hosts of its own.
It shares this machine's files and process ids, and no packet leaves the machine. It needs root.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path

_NETWORK = "10.77.0"

#: What both ends of the cable between two emulated hosts are called.
_CABLE = "fabric0"


@dataclasses.dataclass(frozen=True)
class Host:
    """One machine.

    Attributes:
        name: what its own `hostname` says.
        address: where the others reach it.
        namespaces_of: the process whose namespaces it is, or None for this machine.
    """

    name: str
    address: str
    namespaces_of: int | None = None

    def command(self, folder: Path, *arguments: str) -> list[str]:
        """Return what runs a program here, with `folder` as its working directory."""
        if self.namespaces_of is None:
            return list(arguments)
        namespaces = ("--net", "--mount", "--uts", f"--target={self.namespaces_of}")
        return ["nsenter", *namespaces, f"--wdns={folder}", "--", *arguments]


#: This machine, as often as wanted.
THIS_HOST = Host("localhost", "127.0.0.1")


@contextlib.contextmanager
def two_emulated_hosts(folder: Path) -> Iterator[list[Host]]:
    """Run two emulated hosts, n1 and n2, joined by one cable.

    Args:
        folder: for their /etc/hosts.

    Raises:
        OSError: this machine does not let us.
    """
    names = ["n1", "n2"]
    addresses = {name: f"{_NETWORK}.{index + 11}" for index, name in enumerate(names)}
    lines = [f"{address} {name}\n" for name, address in addresses.items()]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    with contextlib.ExitStack() as stack:
        hosts = [Host(name, addresses[name], _boot(stack, folder, name)) for name in names]
        one, two = (f"/proc/{host.namespaces_of}/ns/net" for host in hosts)
        _run("ip", "link", "add", _CABLE, "netns", one,
             "type", "veth", "peer", "name", _CABLE, "netns", two)  # fmt: skip
        for host in hosts:
            for settings in (
                ["address", "add", f"{host.address}/24", "dev", _CABLE],
                ["link", "set", _CABLE, "up"],
                ["link", "set", "lo", "up"],
            ):
                _run(*host.command(folder, "ip", *settings))
        yield hosts


def _boot(stack: contextlib.ExitStack, folder: Path, name: str) -> int:
    """Start a process that holds the namespaces of one host; return its id."""
    script = (
        f"hostname {name}"
        f" && mount --bind {folder}/hosts /etc/hosts"
        f" && mount --bind {folder}/nsswitch.conf /etc/nsswitch.conf"
        " && echo up && exec sleep infinity"
    )
    holder = subprocess.Popen(
        ["unshare", "--net", "--mount", "--uts", "sh", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    stack.callback(holder.wait)
    stack.callback(holder.kill)
    assert holder.stdout is not None
    with holder.stdout:
        said = holder.stdout.readline()
    if said != "up\n":
        raise OSError(f"no namespaces for an emulated host: {said.strip()}")
    return holder.pid


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
