"""The scripts of deploy/slurm as scripts: what Slurm makes of them, and how they end.

The server is stood in for by a few lines of shell here, so that its faults can be chosen;
test_serving.py runs the real one.
"""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.integration.slurm.cluster import SlurmCluster
from tests.integration.slurm.jobs import SCRIPTS, Submit

BOTH = ["serve-one-node.sbatch", "serve-two-nodes.sbatch"]

#: Serves until TERM, like the real coordinator; its shards end when it is gone, and rank 1 fails
#: while there is a file `broken`.
_STAND_IN = """\
#!/bin/bash
cd "{folder}"
case $1 in
coordinator)
    touch serving
    trap 'rm serving; exit 0' TERM
    echo "http://nowhere" >"$NDIF_ACTOR_ADDRESS_FILE"
    while :; do sleep 0.1; done;;
shard)
    echo "$SLURM_PROCID of $SLURM_NTASKS" >>started
    while [ -e serving ]; do
        [ -e broken ] && [ "$SLURM_PROCID" = 1 ] && exit 9
        sleep 0.1
    done;;
esac
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder with a program called ndif-actor."""
    program = tmp_path / "ndif-actor"
    program.write_text(_STAND_IN.format(folder=tmp_path))
    program.chmod(0o755)
    return tmp_path


def _path(stand_in: Path) -> str:
    return f"{stand_in}:/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.mark.parametrize("script", BOTH)
def test_slurm_accepts_the_script(cluster: SlurmCluster, script: str) -> None:
    answer = cluster.command("sbatch", "--test-only", str(SCRIPTS / script))

    assert "to start at" in answer


def test_both_scripts_serve_in_the_same_way() -> None:
    """What follows the marker is a copy, so that each script stands alone: keep it one."""
    marker = "# ---- Below this line"
    one, two = ((SCRIPTS / script).read_text().split(marker) for script in BOTH)

    assert len(one) == len(two) == 2
    assert one[1] == two[1]


def test_the_secret_is_for_its_owner_only_and_goes_with_the_job(
    submit: Submit, stand_in: Path
) -> None:
    job = submit("serve-one-node.sbatch", PATH=_path(stand_in))
    job.wait_for_url()
    [secret] = job.secrets_left()
    mode, length = stat.S_IMODE(secret.stat().st_mode), len(secret.read_text())

    job.reach_time_limit()

    assert job.wait_for_end() == ("COMPLETED", "0:0")
    assert (mode, length) == (0o600, 45)
    assert job.secrets_left() == []
    assert not job.address_file.exists()


def test_shards_that_always_fail_are_given_up_after_the_stated_restarts(
    submit: Submit, stand_in: Path
) -> None:
    (stand_in / "broken").touch()

    job = submit(
        "serve-two-nodes.sbatch",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        PATH=_path(stand_in),
        SITE_RESTARTS="2",
    )

    assert job.wait_for_end() == ("FAILED", "1:0")
    assert "the shards have ended 3 times; giving up" in job.output()
    started = (stand_in / "started").read_text().split("\n")
    assert [started.count(f"{rank} of 4") for rank in range(4)] == [3, 3, 3, 3]
    assert not (stand_in / "serving").exists()
