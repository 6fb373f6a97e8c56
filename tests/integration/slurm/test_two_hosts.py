"""Two hosts with addresses of their own, emulated: needs root; runs when TEST_TWO_HOSTS is set.

Nothing about the network is stated here; the script has to find it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.slurm.cluster import SlurmCluster, cluster_of_two_hosts
from tests.integration.slurm.jobs import SCRIPTS, ServerJob

_EXPERIMENT = "tests.integration.slurm.experiment"

pytestmark = pytest.mark.skipif(
    not os.environ.get("TEST_TWO_HOSTS"), reason="slow, and needs root: set TEST_TWO_HOSTS=1"
)


@pytest.fixture
def two_hosts() -> Iterator[SlurmCluster]:
    """A Slurm whose nodes n1 and n2 have names and addresses of their own."""
    with cluster_of_two_hosts() as cluster:
        yield cluster


def test_two_hosts_serve_a_client_on_either(two_hosts: SlurmCluster, llama: Path) -> None:
    job = ServerJob.submit(
        two_hosts,
        "serve-two-nodes.sbatch",
        NDIF_ACTOR_MODEL=str(llama),
        NDIF_ACTOR_DEVICE="cpu",
        NDIF_ACTOR_DTYPE="float32",
        NDIF_ACTOR_HOST="",
        SITE_INTERFACE="",
    )
    url = job.wait_for_url()

    assert url.startswith(f"http://{two_hosts.nodes['n1'].address}:")
    for name in ("n1", "n2"):
        done = subprocess.run(
            two_hosts.nodes[name].command(
                SCRIPTS.parents[1], sys.executable, "-m", _EXPERIMENT, url, str(llama)
            ),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"on {name}: {done.stderr}"

    job.reach_time_limit()
    assert job.wait_for_end() == ("COMPLETED", "0:0"), job.output()
    assert job.processes_left() == []
