"""What a shard sets before torch is imported, and which device it takes."""

from __future__ import annotations

import pytest

from ndif_actor.device import (
    Meeting,
    Place,
    num_threads,
    one_device,
    prepare_environment,
    rendezvous,
)
from ndif_actor.errors import LaunchError
from ndif_actor.messages import Load


def place(local_rank: int = 0, local_world_size: int = 2) -> Place:
    return Place(
        rank=local_rank,
        world_size=local_world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        interface="lo",
    )


def load(port: int = 29500) -> Load:
    return Load(
        folder="/models/x",
        dtype="float32",
        device="cpu",
        master_addr="127.0.0.1",
        master_port=port,
        group_timeout_s=30,
    )


def test_every_rank_gets_a_gpu_of_its_own() -> None:
    assert one_device({}, place(1)) == "1"
    assert one_device({"CUDA_VISIBLE_DEVICES": "4,6"}, place(1)) == "6"
    assert one_device({"CUDA_VISIBLE_DEVICES": "GPU-aa,GPU-bb"}, place(0)) == "GPU-aa"


def test_a_gpu_the_launcher_has_picked_for_the_task_is_taken() -> None:
    assert one_device({"CUDA_VISIBLE_DEVICES": "5"}, place(1)) == "5"


def test_a_rank_without_a_gpu_is_told_what_is_visible() -> None:
    with pytest.raises(LaunchError, match=r"local rank 2 has no GPU.*'0,1' names 2"):
        one_device({"CUDA_VISIBLE_DEVICES": "0,1"}, place(2, 3))
    with pytest.raises(LaunchError, match="names 1, and 2 shards run on this machine"):
        one_device({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "1"}, place(1))


def test_the_one_visible_gpu_is_local_rank_zero() -> None:
    environment: dict[str, str] = {}
    prepare_environment(environment, place(1), load(), "cuda")

    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment["LOCAL_RANK"] == "0"
    assert environment["RANK"] == "1"


def test_a_chosen_interface_is_kept() -> None:
    environment = {"GLOO_SOCKET_IFNAME": "eth7"}
    prepare_environment(environment, place(), load(), "cpu")

    assert environment["GLOO_SOCKET_IFNAME"] == "eth7"


def test_the_rendezvous_is_the_coordinators_or_the_launchers() -> None:
    launcher = {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}

    assert rendezvous(load(29500), launcher) == Meeting("127.0.0.1", 29500)
    assert rendezvous(load(0), launcher) == Meeting("node1", 1234)
    assert rendezvous(load(0), launcher | torchrun) == Meeting("node1", 1234, True, "attempt-2")
    with pytest.raises(LaunchError, match="MASTER_PORT must be set"):
        rendezvous(load(0), {"MASTER_ADDR": "node1"})


def test_cores_are_shared_by_the_shards_of_a_machine_unless_chosen() -> None:
    assert num_threads({"OMP_NUM_THREADS": "3"}, 2) == 3
    assert num_threads({}, 10_000) == 1
