"""Puts the processes together: what `serve`, `coordinator` and `shard` run."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import cast

from ndif_actor.actor.handshake import Address
from ndif_actor.actor.launch import (
    interface_towards,
    new_secret,
    read_launch_environment,
    read_secret,
    write_secret,
)
from ndif_actor.actor.supervisor import die_with_parent
from ndif_actor.config import ConfigError, ServerConfig
from ndif_actor.coordinator.coordinator import Coordinator
from ndif_actor.coordinator.replica import Replica, ReplicaTimes, ShardSource
from ndif_actor.coordinator.sources import PARENT_VARIABLE, JoiningShards, SpawnedShards
from ndif_actor.device import Device, DeviceKind, Place
from ndif_actor.exits import ExitCode
from ndif_actor.http.lifecycle import run_server
from ndif_actor.logs import LogFormat, configure_logs
from ndif_actor.shard import run_shard

#: Seconds that a busy thread keeps the interpreter from one that waits for it.
SWITCH_INTERVAL_S = 0.0005


async def serve_here(config: ServerConfig, folder: Path) -> None:
    """Serve with shards of our own, as children joined by a unix socket.

    Raises:
        ModelError, LaunchError: see `run_server`.
    """
    secret = new_secret().encode()
    options = ["--log-format", config.log_format, "--log-level", config.log_level]
    # Unix socket paths are short (107 bytes), so not below a long TMPDIR of a cluster.
    sockets = tempfile.mkdtemp(prefix="ndif-actor-", dir="/tmp")
    try:
        await _serve(
            config,
            folder,
            SpawnedShards(config.tp, secret, options),
            Address(path=f"{sockets}/shards"),
            secret,
        )
    finally:
        shutil.rmtree(sockets, ignore_errors=True)


async def serve_joining(
    config: ServerConfig, folder: Path, shard_address: str, secret_file: Path | None
) -> None:
    """Serve with shards that others start.

    Args:
        config: settings.
        folder: the model's files, where every shard can read them.
        shard_address: where shards join.
        secret_file: is read, or written if there is none; without it, the environment is read.

    Raises:
        ModelError, LaunchError: see `run_server`.
    """
    secret = _read_or_make_secret(secret_file)
    await _serve(config, folder, JoiningShards(), _address(shard_address), secret)


async def run_one_shard(
    join: str, secret_file: Path | None, device: str | None, log_format: str, log_level: str
) -> ExitCode:
    """Be one shard, at the place that the launcher's environment says.

    Raises:
        LaunchError: no place, no secret, or no coordinator.
        ConfigError: an argument is wrong.
    """
    launch = read_launch_environment(os.environ)
    configure_logs(cast(LogFormat, log_format), log_level, actor="shard", rank=launch.rank)
    if PARENT_VARIABLE in os.environ:
        die_with_parent(int(os.environ[PARENT_VARIABLE]))
    place = Place(
        rank=launch.rank,
        world_size=launch.world_size,
        local_rank=launch.local_rank,
        local_world_size=launch.local_world_size,
        interface=interface_towards(launch.master_addr) if launch.master_addr else None,
    )
    secret = read_secret(os.environ, secret_file)
    if device not in (None, "auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: give auto, cpu or cuda")
    kind = None if device == "auto" else cast(DeviceKind | None, device)
    return await run_shard(_address(join), secret, place, Device(place, kind))


async def _serve(
    config: ServerConfig, folder: Path, source: ShardSource, address: Address, secret: bytes
) -> None:
    # The event loop must not wait long for the interpreter while admission computes.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    replica = Replica(
        config.tp,
        source=source,
        address=address,
        secret=secret,
        times=ReplicaTimes(
            join_s=config.join_timeout_s,
            load_s=config.load_timeout_s,
            pass_s=config.pass_timeout_s,
            group_s=config.group_timeout_s,
        ),
    )
    coordinator = Coordinator(config, model_id_of(config.model, folder), replica)
    await run_server(config, coordinator, folder)


def _read_or_make_secret(file: Path | None) -> bytes:
    if file is not None and not file.exists():
        return write_secret(file)
    return read_secret(os.environ, file)


def model_id_of(model: str, folder: Path) -> str:
    """Return what clients call the model: the name it was asked for by, without local paths."""
    return folder.resolve().name if Path(model).is_dir() else model


def _address(text: str) -> Address:
    try:
        return Address.parse(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None
