"""What the launcher (torchrun, srun, or our own server) tells a shard about its place."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ndif_actor.errors import LaunchError

#: The environment variable that holds the secret of the run's links.
SECRET_VARIABLE = "NDIF_ACTOR_SECRET"


class LaunchEnvironment(msgspec.Struct, frozen=True, kw_only=True):
    """A process's place among those started together.

    Attributes:
        launcher: "torchrun", "slurm" or "variables" (RANK and WORLD_SIZE set by hand or by us).
        rank, world_size: among all.
        local_rank, local_world_size: among those on this machine.
        master_addr, master_port: the rendezvous, where the launcher names one.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str | None = None
    master_port: int | None = None


def read_launch_environment(environment: Mapping[str, str]) -> LaunchEnvironment:
    """Read the launcher's variables; torchrun's win over Slurm's, which are its agent's.

    Raises:
        LaunchError: there are none, or one is not a number.
    """
    if "RANK" in environment:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "variables"
        rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        local_rank = _number(environment, "LOCAL_RANK", rank)
        local_world_size = _number(environment, "LOCAL_WORLD_SIZE", world_size)
    elif "SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment:
        # A batch script has SLURM_PROCID too, but only the tasks of a step are ranks.
        launcher = "slurm"
        rank = _number(environment, "SLURM_PROCID")
        world_size = _number(environment, "SLURM_NTASKS")
        local_rank = _number(environment, "SLURM_LOCALID")
        local_world_size = _tasks_here(environment, world_size)
    else:
        raise LaunchError(
            "this process has no rank: start shards with srun or torchrun, or set RANK and "
            "WORLD_SIZE (LOCAL_RANK and LOCAL_WORLD_SIZE too, on several machines)"
        )
    if not 0 <= rank < world_size:
        raise LaunchError(f"rank {rank} is outside of a world of {world_size}")
    port = _number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else None
    return LaunchEnvironment(
        launcher=launcher,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=environment.get("MASTER_ADDR"),
        master_port=port,
    )


def interface_towards(host: str) -> str | None:
    """Return the name of the network interface that has the route to `host`, or None.

    gloo otherwise takes the address its own host name resolves to, which often is 127.0.0.1.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            address = probe.getsockname()[0]
    except OSError:
        return None
    import psutil

    interfaces: dict[str, list[Any]] = psutil.net_if_addrs()
    for name, addresses in interfaces.items():
        if any(entry.address == address for entry in addresses):
            return name
    return None


def new_secret() -> str:
    """Return a secret for one run."""
    return secrets.token_urlsafe(32)


def read_secret(environment: Mapping[str, str], file: Path | None) -> bytes:
    """Return the run's secret from a file or the environment.

    Raises:
        LaunchError: there is none, or others may read the file.
    """
    if file is None:
        value = environment.get(SECRET_VARIABLE, "").strip()
        if not value:
            raise LaunchError(f"no secret: give --secret-file, or set {SECRET_VARIABLE}")
        return value.encode()
    try:
        if file.stat().st_mode & 0o077:
            raise LaunchError(f"{file} can be read by others; chmod 600 it")
        value = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"the secret in {file} can't be read: {error}") from None
    if not value:
        raise LaunchError(f"{file} is empty")
    return value.encode()


def write_secret(file: Path) -> bytes:
    """Make a secret, write it to a new file that only its owner may read, and return it."""
    secret = new_secret()
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secret + "\n")
        # Under its name it is there whole or not at all: shards may be waiting for it.
        os.link(draft, file)
    finally:
        draft.unlink()
    return secret.encode()


def _tasks_here(environment: Mapping[str, str], world_size: int) -> int:
    """Number of tasks on this node, from "2(x3),1" and this node's place in it."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        count, _, repeated = part.partition("(x")
        try:
            counts += [int(count)] * int(repeated.rstrip(")") or 1)
        except ValueError:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not understood") from None
    node = _number(environment, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else world_size


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name)
    if value is None:
        if default is not None:
            return default
        raise LaunchError(f"the launcher has not set {name}")
    try:
        return int(value)
    except ValueError:
        raise LaunchError(f"{name}={value!r} is not a number") from None
