"""One request of each kind a researcher sends, for any family."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.requests import Landmarks, Recorder, Request, landmarks

EIFFEL = [5, 17, 99, 250, 3, 41, 8]
COLOSSEUM = [5, 18, 99, 250, 3, 41, 8]
SHORT = [7, 30]

Experiment = Callable[[Landmarks], Request]


def logits(recorder: Recorder, invoke: int = 0) -> None:
    recorder.save(recorder.read("output[logits]", invoke))


def save(at: Landmarks) -> Request:
    recorder = Recorder()
    recorder.save(recorder.read(f"{at.block}.output"))
    recorder.save(recorder.read(f"{at.attention}.output[0]"))
    return Request(recorder, [[EIFFEL]])


def replace(at: Landmarks) -> Request:
    recorder = Recorder()
    before = recorder.read(f"{at.mlp}.output")
    recorder.write(f"{at.mlp}.output", recorder.apply("tanh", before))
    logits(recorder)
    recorder.save(before)
    return Request(recorder, [[EIFFEL]])


def replace_by_a_number(at: Landmarks) -> Request:
    recorder = Recorder()
    recorder.write(f"{at.attention}.output[0]", 0.25)
    logits(recorder)
    return Request(recorder, [[EIFFEL]])


def write_a_slice(at: Landmarks) -> Request:
    recorder = Recorder()
    before = recorder.read(f"{at.mlp}.output")
    index = (slice(None), -1)
    recorder.write(f"{at.mlp}.output", recorder.apply("setitem", before, index, 0.0))
    logits(recorder)
    return Request(recorder, [[EIFFEL]])


def read_after_a_write(at: Landmarks) -> Request:
    recorder = Recorder()
    before = recorder.read(f"{at.block}.output")
    recorder.write(f"{at.block}.output", recorder.apply("mul", before, 2.0))
    between = recorder.read(f"{at.block}.output")
    recorder.write(f"{at.block}.output", recorder.apply("add", between, 1.0))
    after = recorder.read(f"{at.block}.output")
    below = recorder.read(f"{at.next_block}.input[args.0]")
    for value in (before, between, after, below):
        recorder.save(value)
    logits(recorder)
    return Request(recorder, [[EIFFEL]])


def write_an_input(at: Landmarks) -> Request:
    recorder = Recorder()
    before = recorder.read(f"{at.block}.input[args.0]")
    recorder.write(f"{at.block}.input[args.0]", recorder.apply("flip", before, (2,)))
    recorder.save(recorder.read(f"{at.block}.output"))
    logits(recorder)
    return Request(recorder, [[EIFFEL]])


def ablate_a_head(at: Landmarks) -> Request:
    recorder = Recorder()
    heads = recorder.read(f"{at.projection}.input[args.0]")
    index = (slice(None), slice(None), slice(12, 24))
    recorder.write(f"{at.projection}.input[args.0]", recorder.apply("setitem", heads, index, 0.0))
    logits(recorder)
    return Request(recorder, [[EIFFEL]])


def logit_lens(at: Landmarks) -> Request:
    recorder = Recorder()
    hidden = recorder.read(f"{at.block}.output")
    lens = recorder.call(at.lm_head, recorder.call(at.norm, hidden))
    recorder.save(lens)
    recorder.save(recorder.apply("topk", recorder.apply("getitem", lens, (slice(None), -1)), 5))
    return Request(recorder, [[EIFFEL]])


def call_an_mlp(at: Landmarks) -> Request:
    recorder = Recorder()
    hidden = recorder.read(f"{at.block}.output")
    recorder.save(recorder.call(at.mlp, hidden))
    recorder.write(f"{at.block}.output", recorder.call(at.mlp, hidden))
    logits(recorder)
    return Request(recorder, [[EIFFEL]])


def patch_between_prompts(at: Landmarks) -> Request:
    recorder = Recorder()
    clean = recorder.read(f"{at.block}.output", 0)
    corrupted = recorder.read(f"{at.block}.output", 1)
    index = (slice(None), 3)
    patch = recorder.apply("getitem", clean, index)
    recorder.write(f"{at.block}.output", recorder.apply("setitem", corrupted, index, patch), 1)
    logits(recorder, 0)
    logits(recorder, 1)
    return Request(recorder, [[EIFFEL], [COLOSSEUM]])


def patch_a_shorter_prompt(at: Landmarks) -> Request:
    recorder = Recorder()
    clean = recorder.read(f"{at.mlp}.output", 0)
    last = recorder.apply("getitem", clean, (slice(None), slice(-2, None)))
    recorder.write(f"{at.mlp}.output", last, 1)
    logits(recorder, 1)
    return Request(recorder, [[EIFFEL], [SHORT]])


def steer_a_batch(at: Landmarks) -> Request:
    recorder = Recorder()
    direction = recorder.constant(torch.linspace(-1, 1, 48, dtype=torch.float64))
    before = recorder.read(f"{at.block}.output")
    recorder.write(f"{at.block}.output", recorder.apply("add", before, direction, alpha=3))
    logits(recorder)
    return Request(recorder, [[EIFFEL, COLOSSEUM, EIFFEL[::-1]]])


def unequal_prompts(at: Landmarks) -> Request:
    recorder = Recorder()
    mask = recorder.read("input[kwargs.attention_mask]")
    hidden = recorder.read(f"{at.block}.output")
    count = recorder.apply("unsqueeze", recorder.apply("sum", mask, 1), 1)
    mean = recorder.apply("div", recorder.apply("sum", hidden, 1), count)
    recorder.save(mean)
    recorder.save(mask)
    recorder.write(f"{at.block}.output", recorder.apply("unsqueeze", mean, 1))
    logits(recorder)
    return Request(recorder, [[SHORT, EIFFEL, [9]]])


def use_parameters(at: Landmarks) -> Request:
    recorder = Recorder()
    weight = recorder.parameter(f"{at.lm_head}.weight")
    hidden = recorder.read(f"{at.norm}.output")
    recorder.save(recorder.apply("linear", hidden, weight))
    recorder.save(recorder.parameter(f"{at.norm}.weight"))
    logits(recorder)
    return Request(recorder, [[EIFFEL]])


def compute_before_the_forward(at: Landmarks) -> Request:
    recorder = Recorder()
    weight = recorder.parameter(f"{at.lm_head}.weight")
    direction = recorder.apply("getitem", weight, 42)
    unit = recorder.apply("normalize", direction, dim=0)
    recorder.save(unit)
    hidden = recorder.read(f"{at.block}.output")
    along = recorder.apply("matmul", hidden, unit)
    outer = recorder.apply("mul", recorder.apply("unsqueeze", along, -1), unit)
    recorder.write(f"{at.block}.output", recorder.apply("sub", hidden, outer))
    logits(recorder)
    return Request(recorder, [[EIFFEL]])


EXPERIMENTS: tuple[Experiment, ...] = (
    save,
    replace,
    replace_by_a_number,
    write_a_slice,
    read_after_a_write,
    write_an_input,
    ablate_a_head,
    logit_lens,
    call_an_mlp,
    patch_between_prompts,
    patch_a_shorter_prompt,
    steer_a_batch,
    unequal_prompts,
    use_parameters,
    compute_before_the_forward,
)

#: Those whose prompts have unequal lengths.
RAGGED = (patch_a_shorter_prompt, unequal_prompts)


# ---------------------------------------------------------------- generations


def plain(ids: list[int]) -> Request:
    return Request(Recorder(), [[ids]])


def touching_steps(family: str) -> Request:
    """Read and write at the prefill, at one step, at some steps and at all of them."""
    block, head = landmarks(family).block, landmarks(family).lm_head
    recorder = Recorder()
    first = recorder.read(f"{block}.output")
    recorder.save(first)
    last = recorder.apply("getitem", first, (slice(None), slice(-1, None)))
    direction = recorder.apply("mul", last, 0.1)
    with recorder.during(0):
        hidden = recorder.read(f"{block}.output")
        recorder.save(recorder.apply("getitem", hidden, (slice(None), -1)))
        recorder.save(recorder.apply("getitem", recorder.read(f"{head}.output"), (slice(None), -1)))
    with recorder.during(1, 5, 2):
        before = recorder.read(f"{block}.input[args.0]")
        recorder.write(f"{block}.input[args.0]", recorder.apply("add", before, direction))
    with recorder.during(2, 3):
        recorder.write(f"{block}.output", last)
    with recorder.during(3):
        recorder.save(recorder.apply("sub", recorder.read(f"{block}.output"), last))
    return Request(recorder, [[EIFFEL]])
