"""A shard learns its place from whichever launcher started it, or says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from ndif_actor.actor.launch import (
    SECRET_VARIABLE,
    interface_towards,
    read_launch_environment,
    read_secret,
    write_secret,
)
from ndif_actor.errors import LaunchError

SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}


def test_slurm_tells_rank_and_tasks_on_this_node() -> None:
    place = read_launch_environment(SLURM)

    assert (place.launcher, place.rank, place.world_size) == ("slurm", 3, 4)
    assert (place.local_rank, place.local_world_size) == (1, 2)


def test_uneven_tasks_per_node_are_counted_for_this_node() -> None:
    uneven = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3,1"}

    assert read_launch_environment(uneven).local_world_size == 1


def test_torchrun_wins_over_the_variables_of_the_slurm_task_it_runs_in() -> None:
    place = read_launch_environment({**SLURM, **TORCHRUN})

    assert (place.launcher, place.rank, place.world_size) == ("torchrun", 1, 2)
    assert (place.master_addr, place.master_port) == ("10.0.0.1", 29500)


def test_a_batch_script_is_no_rank_although_slurm_gives_it_a_procid() -> None:
    batch = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}

    with pytest.raises(LaunchError, match="srun or torchrun"):
        read_launch_environment(batch)


@pytest.mark.parametrize("broken", [{"WORLD_SIZE": "two"}, {"RANK": "2"}])
def test_a_variable_that_makes_no_sense_is_named(broken: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match=r"WORLD_SIZE|rank 2"):
        read_launch_environment({**TORCHRUN, **broken})


def test_a_written_secret_is_private_and_read_back(tmp_path: Path) -> None:
    secret = write_secret(tmp_path / "secret")

    assert read_secret({}, tmp_path / "secret") == secret
    assert (tmp_path / "secret").stat().st_mode & 0o077 == 0
    assert len(secret) >= 32


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    write_secret(tmp_path / "secret")
    (tmp_path / "secret").chmod(0o644)

    with pytest.raises(LaunchError, match="chmod 600"):
        read_secret({}, tmp_path / "secret")


def test_without_any_secret_the_error_says_where_to_give_one() -> None:
    with pytest.raises(LaunchError, match=SECRET_VARIABLE):
        read_secret({}, None)


def test_the_interface_towards_loopback_is_loopback() -> None:
    assert interface_towards("127.0.0.1") == "lo"
