"""The configuration files of a test cluster: no systemd, no cgroups, fake GPUs.

Every path is given, so that /etc/slurm and /etc/munge are not read. Each node claims GPUs (links to
/dev/null), so that scripts that ask for GPUs are scheduled as on a real cluster.
"""

from __future__ import annotations

import getpass
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.integration.slurm.hosts import Host

_GPUS_PER_NODE = 4

#: proctrack/linuxproc, task/none and the cgroup/v1 plugin touch no cgroup; without naming that
#: plugin slurmd refuses to start where /sys/fs/cgroup is missing. config_overrides lets the nodes
#: claim more processors and memory than the machine has.
_SLURM_CONF = """\
ClusterName=test
SlurmctldHost={head.name}({head.address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
KillWait=5
MinJobAge=600
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""

_NODE = (
    "NodeName={name} NodeHostname={host.name} NodeAddr={host.address} Port={port} CPUs=16 Boards=1 "
    "SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:{gpus} "
    "State=UNKNOWN"
)


def write_configuration(folder: Path, nodes: Mapping[str, Host], ports: Sequence[int]) -> None:
    """Fill an empty folder with all that the daemons read.

    Args:
        folder: becomes the place of all state, too.
        nodes: by name; slurmctld runs on the host of the first.
        ports: one for slurmctld, then one a node.
    """
    (folder / "state").mkdir()
    for name in nodes:
        (folder / f"spool-{name}").mkdir()
    for index in range(_GPUS_PER_NODE):
        # slurmd insists on device files, and takes links to them.
        (folder / f"nvidia{index}").symlink_to("/dev/null")
    lines = [
        _NODE.format(name=name, host=host, port=port, gpus=_GPUS_PER_NODE)
        for (name, host), port in zip(nodes.items(), ports[1:], strict=True)
    ]
    (folder / "slurm.conf").write_text(
        _SLURM_CONF.format(
            folder=folder,
            head=next(iter(nodes.values())),
            port=ports[0],
            user=getpass.getuser(),
            nodes="\n".join(lines),
        )
    )
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "gres.conf").write_text(
        f"AutoDetect=off\nNodeName={','.join(nodes)} Name=gpu "
        f"File={folder}/nvidia[0-{_GPUS_PER_NODE - 1}]\n"
    )
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))


def munge_flags(folder: Path) -> list[str]:
    """Return the arguments of a munged that keeps everything in `folder`."""
    return [
        "--foreground",
        "--force",
        f"--key-file={folder}/munge.key",
        f"--socket={folder}/munge.socket",
        f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/munged.log",
        f"--seed-file={folder}/munged.seed",
    ]
