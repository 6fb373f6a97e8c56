"""Real weights: SmolLM2-135M in float32 against plain transformers with plain hooks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ndif_actor.engine.cpu import kernel_environment
from ndif_actor.engine.engine import Engine
from ndif_actor.engine.tokens import Tokenizer
from tests.oracle import Oracle
from tests.requests import Recorder, Request, assert_equal, run_and_save

PROMPTS = """The Eiffel Tower is in the city of
The Colosseum is in the city of
The capital of Japan is Tokyo and the capital of Italy is
When Mary and John went to the store, John gave a drink to
Two plus two equals
In 1969, the first man landed on the
Once upon a time there was a
To be or not to be, that is the
Hello, my name is
Paris is the capital of
Cats and dogs are common
Python is a programming""".splitlines()

#: Of logits around 30.
TOLERANCE = 2e-4


def patching(clean: list[int], corrupted: list[int]) -> Request:
    recorder = Recorder()
    index = (slice(None), -1)
    patch = recorder.apply("getitem", recorder.read("model.layers.12.output", 0), index)
    before = recorder.read("model.layers.12.output", 1)
    recorder.write("model.layers.12.output", recorder.apply("setitem", before, index, patch), 1)
    recorder.save(recorder.read("output[logits]", 1))
    return Request(recorder, [[clean], [corrupted]])


def ablation(ids: list[int], layer: int) -> Request:
    recorder = Recorder()
    hook = f"model.layers.{layer}.mlp.output"
    before = recorder.read(hook)
    recorder.write(hook, recorder.apply("setitem", before, (slice(None), -1), 0.0))
    recorder.save(recorder.read("output[logits]"))
    return Request(recorder, [[ids]])


def lens(ids: list[int], layer: int) -> Request:
    recorder = Recorder()
    hidden = recorder.read(f"model.layers.{layer}.output")
    recorder.save(recorder.call("lm_head", recorder.call("model.norm", hidden)))
    return Request(recorder, [[ids]])


def compare(folder: Path) -> None:
    """Compare 32 requests in one forward, and each alone, with the oracle."""
    engine = Engine.load(folder, dtype="float32", device="cpu", rank=0, world_size=1)
    oracle = Oracle(folder, torch.float32)
    ids = [Tokenizer.load(folder).encode(prompt) for prompt in PROMPTS]
    requests = [patching(ids[0], ids[1])]
    requests += [ablation(ids[n % len(ids)], 2 * n) for n in range(15)]
    requests += [lens(ids[n % len(ids)], n) for n in range(14, 30)]
    assert len(requests) == 32

    together = run_and_save(engine, requests)

    for request, values in zip(requests, together, strict=True):
        assert_equal(values, request.on(oracle), TOLERANCE)
    for request in requests[::8]:
        assert_equal(run_and_save(engine, [request])[0], request.on(oracle), TOLERANCE)


def test_smollm2_equals_plain_hooks_alone_and_with_31_others(smollm2: Path) -> None:
    # A process of its own, because a shard's settings must be there before torch is imported.
    environment = {**kernel_environment("float32"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.integration.engine.test_smollm2", str(smollm2)]

    done = subprocess.run(
        ["env", *(f"{name}={value}" for name, value in environment.items()), *command],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    if done.returncode:
        pytest.fail(done.stderr[-3000:])


if __name__ == "__main__":
    compare(Path(sys.argv[1]))
