"""Shards that torchrun starts join a coordinator and serve."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.slurm.cluster import free_ports
from tests.integration.slurm.experiment import check, run_at
from tests.integration.slurm.processes import wait_for_none

_PROGRAMS = Path(sys.executable).parent

#: Starts a program of this environment; everything it starts ends with the test.
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A function that starts a program, logging to tmp_path/log; no process survives the test."""
    with contextlib.ExitStack() as stack:

        def start_program(program: str, *arguments: str) -> subprocess.Popen[bytes]:
            log = stack.enter_context((tmp_path / "log").open("ab"))
            process = subprocess.Popen(
                [str(_PROGRAMS / program), *arguments],
                env=os.environ | {"STARTED_BY_TEST": str(tmp_path), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        yield start_program
    assert wait_for_none([f"STARTED_BY_TEST={tmp_path}"], timeout_s=10.0) == []


async def test_torchrun_starts_shards_that_serve_and_end_with_the_coordinator(
    start: Start, tmp_path: Path, llama: Path
) -> None:
    shard_port, master_port = free_ports(2)
    address, secret = f"tcp://127.0.0.1:{shard_port}", tmp_path / "secret"
    coordinator = start(
        *("ndif-actor", "coordinator", str(llama), "--tp=2", "--device=cpu", "--dtype=float32"),
        *("--port=0", f"--address-file={tmp_path}/url"),
        *("--shard-address", address, "--secret-file", str(secret)),
    )
    await asyncio.to_thread(_wait_for, secret, coordinator)
    torchrun = start(
        *("torchrun", "--nproc-per-node=2", f"--master-port={master_port}", "--no-python"),
        *(str(_PROGRAMS / "ndif-actor"), "shard", "--join", address, "--secret-file", str(secret)),
    )
    await asyncio.to_thread(_wait_for, tmp_path / "url", coordinator)
    check(await run_at((tmp_path / "url").read_text().strip()), llama)

    coordinator.send_signal(signal.SIGTERM)

    statuses = [await asyncio.to_thread(process.wait, 20) for process in (coordinator, torchrun)]
    assert statuses == [0, 0], (tmp_path / "log").read_text()


def _wait_for(file: Path, writer: subprocess.Popen[bytes], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not file.exists():
        log = file.with_name("log")
        assert writer.poll() is None, f"ended without writing {file}:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"no {file} in {timeout_s:.0f} s:\n{log.read_text()}"
        time.sleep(0.05)
