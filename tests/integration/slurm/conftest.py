"""A running Slurm, and servers submitted to it with the scripts of deploy/slurm."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeModel
from tests.integration.slurm.cluster import (
    SlurmCluster,
    cluster_on_loopback,
    missing_programs,
)
from tests.integration.slurm.jobs import ServerJob, Submit


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """A Slurm of two nodes on this machine."""
    if missing := missing_programs():
        reason = f"{', '.join(missing)} not found: apt-get install slurm-wlm munge iproute2"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with cluster_on_loopback(nodes=2) as cluster:
        yield cluster


@pytest.fixture
def submit(cluster: SlurmCluster) -> Iterator[Submit]:
    """A function that submits one of the scripts; its jobs end with the test."""
    jobs: list[ServerJob] = []

    def submit_job(script: str, *flags: str, **variables: str) -> ServerJob:
        jobs.append(ServerJob.submit(cluster, script, *flags, **variables))
        return jobs[-1]

    yield submit_job
    for job in jobs:
        job.cancel()


@pytest.fixture
def llama(model_folder: MakeModel) -> Path:
    """The folder of a random model whose heads two ranks can share."""
    return model_folder("llama")
