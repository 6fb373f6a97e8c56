"""The scripts of deploy/slurm serve a real model on a real Slurm, to the end of their time."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from ndif_client import Progress, connect, errors
from tests.integration.slurm.experiment import check, run_at, run_in
from tests.integration.slurm.jobs import ServerJob, Submit


async def test_one_node_serves_and_drains_at_the_time_limit(submit: Submit, llama: Path) -> None:
    job = _submit(submit, "serve-one-node.sbatch", llama)
    url = await asyncio.to_thread(job.wait_for_url)
    check(await run_at(url), llama)

    load = Load()
    tracing = asyncio.create_task(load.go_on(url))
    await asyncio.wait_for(load.served.wait(), 30)
    job.reach_time_limit()
    await _check_clean_end(job)
    done, _ = await asyncio.wait((tracing,), timeout=1)
    tracing.cancel()
    assert all(task.exception() is None for task in done)
    assert load.unanswered == 0


async def test_two_nodes_share_a_model_and_come_back_when_a_shard_is_killed(
    submit: Submit, llama: Path
) -> None:
    job = _submit(submit, "serve-two-nodes.sbatch", llama)
    url = await asyncio.to_thread(job.wait_for_url)
    assert sorted(job.shards()) == ["n1", "n2"]
    check(await run_at(url), llama)

    os.kill(job.shards()["n2"], signal.SIGKILL)
    await asyncio.to_thread(job.wait_for_output, "starting them again (1 of 3)")
    await asyncio.to_thread(job.wait_until_ready, url)
    check(await run_at(url), llama)

    job.reach_time_limit()
    await _check_clean_end(job)


def _submit(submit: Submit, script: str, model: Path) -> ServerJob:
    return submit(
        script,
        NDIF_ACTOR_MODEL=str(model),
        NDIF_ACTOR_DEVICE="cpu",
        NDIF_ACTOR_DTYPE="float32",
    )


class Load:
    """Somebody who traces again and again until the server accepts no more.

    Attributes:
        served: set at the first result.
        unanswered: traces that were accepted and have no result.
    """

    def __init__(self) -> None:
        self.served = asyncio.Event()
        self.unanswered = 0

    async def go_on(self, url: str) -> None:
        """Trace until refused, or cancelled."""
        async with connect(url) as session:
            while True:
                try:
                    await run_in(session, self._note)
                except (errors.UnavailableError, errors.ConnectError):
                    return
                self.served.set()

    def _note(self, progress: Progress) -> None:
        if progress.state == "queued":
            self.unanswered = 1
        elif progress.state == "done":
            self.unanswered = 0


async def _check_clean_end(job: ServerJob) -> None:
    assert await asyncio.to_thread(job.wait_for_end) == ("COMPLETED", "0:0"), job.output()
    assert job.processes_left() == []
    assert job.secrets_left() == []
    assert not job.address_file.exists()
