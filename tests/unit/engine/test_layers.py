"""The decoder layers are found by what flows through them, not by their names."""

from __future__ import annotations

import pytest
import torch

from ndif_actor.engine import adapter
from ndif_actor.engine.blueprint import Blueprint
from tests.models import CONFIGS
from tests.requests import FAMILIES, landmarks

#: Their forward fails when rows leave it: GPT-2 gives its output the shape of its input.
RIGID = ("gpt2",)


def blueprint(family: str) -> Blueprint:
    return Blueprint(adapter.build_without_weights(CONFIGS[family](), torch.float32), 1)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in RIGID])
def test_every_layer_has_two_boundaries_and_the_tail_one(family: str) -> None:
    layers = blueprint(family).table.layers

    assert layers is not None
    assert (layers.num_layers, layers.tail) == (3, 6)
    found = [(boundary.path, boundary.port) for boundary in layers.boundaries]
    path = landmarks(family).block.removesuffix(".1")
    wanted = [(f"{path}.{k}", port) for k in range(3) for port in ("input", "output")]
    assert found == [*wanted, (landmarks(family).norm, "input")]
    assert all("args.0" in b.token_axes for b in layers.boundaries if b.port == "input")


def test_moments_fall_into_the_regions_of_their_layers() -> None:
    table = blueprint("llama").table
    assert table.layers is not None
    region = {str(p): table.layers.region(s.order) for p, s in table.sites.items()}

    assert region["model.embed_tokens.output"] == -1
    assert region["model.layers.0.input[args.0]"] == 0
    assert region["model.layers.1.mlp.gate_proj.output"] == 2
    assert region["model.layers.1.output"] == 3
    assert region["model.norm.input[args.0]"] == region["output[logits]"] == 6


@pytest.mark.parametrize("family", RIGID)
def test_a_model_whose_forward_fails_when_rows_leave_keeps_them(family: str) -> None:
    assert blueprint(family).table.layers is None


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_a_model_that_cannot_be_packed_has_no_boundaries(family: str) -> None:
    assert blueprint(family).table.layers is None
