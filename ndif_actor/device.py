"""One shard's device: torch, the process group and the engine, all of one thread.

`shard.py` calls it through its work thread. torch is imported by `Device.load`, after the
environment that it and its libraries read has been set. Nothing here knows a socket.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, MutableMapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import structlog

from ndif_actor.engine.cpu import kernel_environment
from ndif_actor.errors import LaunchError
from ndif_actor.messages import (
    Forget,
    Load,
    Loaded,
    LogLine,
    PassDone,
    RunPass,
    Settle,
    SwapIn,
    SwapOut,
)

if TYPE_CHECKING:
    import torch

    from ndif_actor.engine.engine import Engine

_log = structlog.get_logger(__name__)

DeviceKind = Literal["cpu", "cuda"]


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a shard stands.

    Attributes:
        rank, world_size: in its replica.
        local_rank, local_world_size: among the shards on this machine.
        interface: network interface for gloo, or None to let it choose.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    interface: str | None = None


class Device:
    """The loaded slice; every method runs in the device thread."""

    def __init__(self, place: Place, kind: DeviceKind | None) -> None:
        self._place = place
        self._kind = kind
        self._engine: Engine

    def load(self, load: Load) -> Loaded:
        """Join the process group and load this rank's slice; all ranks do so together.

        Raises:
            LaunchError: there is no device for this rank.
            ModelError: the model can't be served like that.
        """
        began = time.perf_counter()
        kind = self._kind or load.device
        prepare_environment(os.environ, self._place, load, kind)

        import torch

        if kind == "cuda" and not torch.cuda.is_available():
            raise LaunchError("device cuda was asked for, and torch finds no GPU here")
        if kind == "cpu":
            torch.set_num_threads(num_threads(os.environ, self._place.local_world_size))
        device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
        if self._place.world_size > 1:
            self._join_group(load, device)
        from ndif_actor.engine.cache import PAGE_TOKENS
        from ndif_actor.engine.engine import Engine

        self._engine = Engine.load(
            Path(load.folder),
            dtype=load.dtype,
            device=device,
            rank=self._place.rank,
            world_size=self._place.world_size,
            cache_bytes=load.cache_bytes,
            shards_here=self._place.local_world_size,
        )
        cache = self._engine.cache
        # Else each full collection would walk all of transformers in the midst of a forward, which
        # takes longer than the forward.
        gc.collect()
        gc.freeze()
        if kind == "cuda":
            _log.info("device", name=torch.cuda.get_device_name(device))
        return Loaded(
            rank=self._place.rank,
            device=kind,
            load_s=time.perf_counter() - began,
            parameter_bytes=self._engine.parameter_bytes,
            unpackable=self._engine.unpackable,
            cache_pages=cache.num_pages if cache is not None else 0,
            page_tokens=PAGE_TOKENS,
            withheld=self._engine.withheld,
        )

    def run(
        self,
        message: RunPass,
        buffers: list[memoryview],
        allocate: Callable[[int], memoryview],
        tell: Callable[[LogLine], None],
    ) -> tuple[PassDone, list[memoryview]]:
        """Run one forward; return the report and the buffers it refers to.

        `tell` is called with the lines that requests log, while it runs.

        Raises:
            Exception: whatever ends the pass as a whole (a lost peer, no memory); this shard
                can't go on then.
        """
        began = time.perf_counter()
        results, saved = self._engine.run_pass(message, buffers, allocate, tell)
        done = PassDone(
            rank=self._place.rank,
            sequence=message.sequence,
            forward_s=time.perf_counter() - began,
            results=results,
        )
        return done, saved

    def tend(self, message: Settle | Forget | SwapOut | SwapIn) -> None:
        """Do what is to be done between two passes."""
        match message:
            case Settle():
                self._engine.settle(message)
            case Forget(requests=requests):
                self._engine.forget(requests)
            case SwapOut(request=request):
                self._engine.swap_out(request)
            case SwapIn(request=request, pages=pages):
                self._engine.swap_in(request, pages)

    def leave(self) -> None:
        """Leave the process group; the other ranks do so too."""
        if self._place.world_size > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()

    def _join_group(self, load: Load, device: torch.device) -> None:
        import torch.distributed as dist

        meeting = rendezvous(load, os.environ)
        timeout = timedelta(seconds=load.group_timeout_s)
        store = dist.TCPStore(
            meeting.host,
            meeting.port,
            self._place.world_size,
            is_master=self._place.rank == 0 and not meeting.served,
            timeout=timeout,
        )
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            backend="nccl" if on_gpu else "gloo",
            store=dist.PrefixStore(meeting.prefix, store),
            timeout=timeout,
            rank=self._place.rank,
            world_size=self._place.world_size,
            device_id=device if on_gpu else None,
        )


def prepare_environment(
    environment: MutableMapping[str, str], place: Place, load: Load, kind: DeviceKind
) -> None:
    """Set what torch, transformers, gloo and MKL read, before torch is imported.

    Raises:
        LaunchError: fewer GPUs are visible than shards run here.
    """
    for name, value in kernel_environment(load.dtype).items():
        environment.setdefault(name, value)
    environment["RANK"] = str(place.rank)
    environment["WORLD_SIZE"] = str(place.world_size)
    environment["LOCAL_RANK"] = str(place.local_rank)
    environment["LOCAL_WORLD_SIZE"] = str(place.local_world_size)
    if load.master_port:
        environment["MASTER_ADDR"] = load.master_addr
        environment["MASTER_PORT"] = str(load.master_port)
    if kind == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = one_device(environment, place)
        environment["LOCAL_RANK"] = "0"
    if place.interface is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", place.interface)


def one_device(environment: MutableMapping[str, str], place: Place) -> str:
    """Return the one GPU of this rank, as CUDA_VISIBLE_DEVICES names it.

    Raises:
        LaunchError: fewer are visible than shards run here.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(place.local_rank)
    names = [name for name in visible.split(",") if name.strip()]
    shared = environment.get("SLURM_GPUS_ON_NODE") == "1"
    if len(names) == 1 < place.local_world_size and not shared:
        return names[0]  # the launcher has given each task its own
    if place.local_rank >= len(names):
        raise LaunchError(
            f"local rank {place.local_rank} has no GPU: CUDA_VISIBLE_DEVICES={visible!r} names "
            f"{len(names)}, and {place.local_world_size} shards run on this machine"
        )
    return names[place.local_rank]


def num_threads(environment: MutableMapping[str, str], local_world_size: int) -> int:
    """Return how many cores this shard computes on: OMP_NUM_THREADS, or its share of all."""
    chosen = environment.get("OMP_NUM_THREADS", "")
    if chosen.isdecimal() and int(chosen) > 0:
        return int(chosen)
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


class Meeting(msgspec.Struct, frozen=True):
    """Where the ranks meet.

    Attributes:
        host, port: of the TCPStore.
        served: whether the launcher serves it; otherwise rank 0 does.
        prefix: keeps the keys of earlier attempts apart, whose addresses are dead.
    """

    host: str
    port: int
    served: bool = False
    prefix: str = "attempt-0"


def rendezvous(load: Load, environment: Mapping[str, str]) -> Meeting:
    """Return where the ranks meet: the coordinator's choice, or the launcher's variables.

    Raises:
        LaunchError: neither says.
    """
    if load.master_port:
        return Meeting(load.master_addr, load.master_port)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise LaunchError(f"{' and '.join(missing)} must be set: it says where the shards meet")
    try:
        port = int(environment["MASTER_PORT"])
    except ValueError:
        raise LaunchError(f"MASTER_PORT={environment['MASTER_PORT']!r} is not a number") from None
    return Meeting(
        host=environment["MASTER_ADDR"],
        port=port,
        served=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        prefix=f"attempt-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}",
    )
