"""One shard of a tensor-parallel replica, as a process: runs the cases of `shard_cases` in order.

    python -m tests.integration.engine.shard_process FOLDER CASE...

RANK and WORLD_SIZE come from the environment. Rank 0 compares with the oracle and writes what went
wrong in each case, or "", to FOLDER/report.json.
"""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from tests.integration.engine.shard_cases import CASES, Shard


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=30),
    )
    shard = Shard(folder, rank, world_size)
    report = {}
    for name in names:
        case, _, family = name.partition(":")
        try:
            CASES[case](shard, family)
            report[name] = ""
        except Exception:
            # The others go on to the next case, so this rank must too.
            report[name] = traceback.format_exc()
            print(f"rank {rank}, {name}: {report[name]}", file=sys.stderr, flush=True)
    if rank == 0:
        (folder / "report.json").write_bytes(msgspec.json.encode(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
