"""Standard names: the same experiment on every family."""

from __future__ import annotations

import pytest
import torch

from ndif_actor.engine import adapter
from ndif_actor.engine.hookpoints import discover
from ndif_actor.engine.names import standard_names
from tests.models import CONFIGS
from tests.requests import FAMILIES, landmarks


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_all_standard_names(family: str) -> None:
    model = adapter.build_without_weights(CONFIGS[family](), torch.float32)
    names = standard_names(model, discover(model))
    marks = landmarks(family)

    root = names.aliases[""]
    assert root["unembed"] == marks.lm_head
    assert root["norm"] == marks.norm
    assert f"{root['layers']}.1" == marks.block
    assert model.get_submodule(root["embed"]) is model.get_input_embeddings()
    layer = names.aliases[marks.block]
    assert f"{marks.block}.{layer['attn']}" == marks.attention
    assert f"{marks.block}.{layer['mlp']}" == marks.mlp
    assert marks.block in names.residual


def test_a_model_without_attention_has_what_can_be_told() -> None:
    model = adapter.build_without_weights(CONFIGS["mamba"](), torch.float32)
    names = standard_names(model, discover(model))

    assert {"embed", "layers", "unembed"} <= names.aliases[""].keys()
    assert all("attn" not in aliases for aliases in names.aliases.values())
