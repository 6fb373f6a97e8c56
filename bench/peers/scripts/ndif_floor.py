"""What a user of NDIF waits for at least: NNsight in a Ray actor that takes one request at a time.

NDIF 0.1.2 adds an HTTP API, Redis, a queue and an object store to that; it wants a CUDA device.
"""

from __future__ import annotations

import os
from pathlib import Path

import ray

PACKAGES = ["ray", "nnsight", "torch", "transformers"]


# Ray gives an actor as many threads as it has processors.
@ray.remote(num_cpus=os.cpu_count())
class Replica:
    def __init__(self, folder, dtype):
        from nnsight_local import NNsight

        self.local = NNsight(folder, dtype)

    def run(self, request):
        return self.local.run(request)


def make(folder, dtype):
    here = str(Path(__file__).resolve().parent)
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": here}},
    )
    replica = Replica.remote(folder, dtype)
    return lambda request: ray.get(replica.run.remote(request))
