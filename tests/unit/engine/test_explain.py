"""What a request would cost is told without running it, and is what running it takes."""

from __future__ import annotations

import msgspec
import pytest
import torch

from ndif_actor.engine import adapter
from ndif_actor.engine.blueprint import Blueprint
from ndif_client.wire.messages import Decoding, Explanation, RowsAtDepth
from tests.models import CONFIGS
from tests.requests import Recorder, Request

IDS = [5, 6, 7, 8]


def explained(request: Request, family: str = "llama", max_new_tokens: int = 0) -> Explanation:
    blueprint = Blueprint(adapter.build_without_weights(CONFIGS[family](), torch.float32), 1)
    group = request.group(0, 0)
    if max_new_tokens:
        group = msgspec.structs.replace(group, decoding=Decoding(max_new_tokens=max_new_tokens))
    lengths = [[len(ids) for ids in prompts] for prompts in group.invokes]
    price = blueprint.check(group.graph, lengths, [], max_new_tokens)
    return blueprint.explain("request", group, price)


def test_a_trace_of_an_early_layer_leaves_after_it() -> None:
    recorder = Recorder()
    recorder.save(recorder.read("model.layers.0.output"))

    found = explained(Request(recorder, [[IDS]]))

    assert (found.tokens, found.saved_bytes) == (4, 4 * 48 * 4)
    assert found.depth == [RowsAtDepth(0, 4), RowsAtDepth(1, 0)]
    assert found.row_layers == (4, 12)
    assert found.notes == ["1 prompt is done after layer 0"]


def test_a_sweep_begins_as_one_prompt_and_forks_layer_by_layer() -> None:
    recorder = Recorder()
    for layer in range(3):
        recorder.write(f"model.layers.{layer}.output", 0.0, layer)
        logits = recorder.read("lm_head.output", layer)
        recorder.save(recorder.apply("getitem", logits, (slice(None), -1)))

    found = explained(Request(recorder, [[IDS]] * 3))

    assert found.depth == [
        RowsAtDepth(0, 4),
        RowsAtDepth(1, 8),
        RowsAtDepth(2, 12),
        RowsAtDepth(3, 3),
    ]
    assert found.row_layers == (24, 36)
    assert found.notes == [
        "3 prompts begin as 1: equal ones are computed once, up to the first write into each",
        "1 prompt is forked after layer 0",
        "1 prompt is forked after layer 1",
        "1 prompt is forked after layer 2",
        "3 of 12 rows go on to the final norm and the logits",
    ]


def test_a_generation_goes_through_all_layers_and_its_last_token_to_the_logits() -> None:
    found = explained(Request(Recorder(), [[IDS]]), max_new_tokens=5)

    assert found.depth == [RowsAtDepth(0, 4), RowsAtDepth(3, 1)]
    assert found.row_layers == (12, 12)


def test_saves_of_all_steps_are_paid_for() -> None:
    recorder = Recorder()
    with recorder.during(0):
        recorder.save(recorder.read("model.layers.0.output"))

    found = explained(Request(recorder, [[IDS]]), max_new_tokens=5)

    assert found.saved_bytes == (4 + 4 * 1) * 48 * 4


@pytest.mark.parametrize("family", ["gpt2", "mamba"])
def test_a_model_that_keeps_its_rows_says_so(family: str) -> None:
    recorder = Recorder()
    recorder.save(recorder.read("lm_head.output"))

    found = explained(Request(recorder, [[IDS]]), family)

    assert found.depth == [RowsAtDepth(0, 4)]
    assert "none leaves early" in found.notes[0]
