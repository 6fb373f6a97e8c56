"""Graphs of the cost benchmark are real ones, of the size they are said to have."""

from __future__ import annotations

import pytest
import torch

from bench.graphs import arithmetic
from bench.micro.graph_cost import measure
from ndif_actor.coordinator.screening import screen
from ndif_actor.engine import adapter
from ndif_actor.engine.blueprint import Blueprint
from ndif_client.wire.graph import HookPoint
from tests.models import CONFIGS

POINTS = [HookPoint(f"model.layers.{layer}", "output") for layer in range(3)]


@pytest.mark.parametrize("size", [6, 10, 100, 1000])
def test_a_graph_has_its_size_and_passes_the_checks(size: int) -> None:
    graph = arithmetic(POINTS, size)

    assert len(graph.nodes) == size
    screen(graph)
    model = adapter.build_without_weights(CONFIGS["llama"](), torch.float32)
    Blueprint(model, world_size=1).check(graph, [[4]], [])


def test_every_stage_of_every_size_is_measured() -> None:
    model = adapter.build_without_weights(CONFIGS["llama"](), torch.float32)

    figures, seen = measure(Blueprint(model, world_size=1), tokens=4, rounds=1, sizes=(10, 50))

    assert len(figures) == 12
    assert all(figure.spread.median > 0 for figure in figures)
    assert seen["50 nodes"]["bytes"] > seen["10 nodes"]["bytes"]
