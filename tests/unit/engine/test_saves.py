"""Saved values: copied at the moment of saving into memory that somebody else provides."""

from __future__ import annotations

import pytest
import torch

from ndif_actor.engine.saves import GroupSaves, SaveBuffers
from ndif_client.wire.graph import Apply, Graph, ReadHook, Ref, Save
from ndif_client.wire.tensors import ITEM_BYTES, TensorSpec, import_array
from tests.requests import allocate, point

GRAPH = Graph([ReadHook(point("lm_head.output")), Apply("topk", [Ref(0), 2]), Save(Ref(1), "top")])


@pytest.mark.parametrize("name", ITEM_BYTES)
def test_a_value_of_any_dtype_is_copied_bit_for_bit(name: str) -> None:
    buffers = SaveBuffers(allocate)
    value = torch.tensor([[0, 1, 1], [1, 0, 0]]).to(getattr(torch, name)).t()

    spec = buffers.put(value)

    assert spec == TensorSpec(name, (3, 2), 0)  # type: ignore[arg-type]
    back = import_array(spec, buffers.buffers[0], "torch")
    torch.testing.assert_close(back, value, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1, 1)])
def test_a_value_of_any_shape_is_copied(shape: tuple[int, ...]) -> None:
    buffers = SaveBuffers(allocate)

    spec = buffers.put(torch.full(shape, 2.5))

    assert spec.shape == shape
    assert buffers.buffers[0].nbytes == spec.nbytes
    assert (import_array(spec, buffers.buffers[0], "torch") == 2.5).all()


def test_a_saved_value_does_not_follow_what_it_was_copied_from() -> None:
    buffers = SaveBuffers(allocate)
    value = torch.zeros(3)

    spec = buffers.put(value)
    value[:] = 1

    assert import_array(spec, buffers.buffers[0], "torch").tolist() == [0, 0, 0]


def test_several_results_are_saved_under_their_names() -> None:
    buffers = SaveBuffers(allocate)
    saves = GroupSaves(GRAPH, 0, buffers)

    saves(Save(Ref(1), "top"), 2, tuple(torch.tensor([3.0, 5.0, 4.0]).topk(2)))

    (top,) = saves.tuples
    assert (top.node, top.name, top.fields) == (2, "top", ["values", "indices"])
    values = [import_array(spec, buffers.buffers[spec.buffer], "torch") for spec in top.items]
    assert [value.tolist() for value in values] == [[5.0, 4.0], [1, 2]]


def test_groups_share_the_buffers_of_a_pass() -> None:
    buffers = SaveBuffers(allocate)
    first, second = GroupSaves(GRAPH, 0, buffers), GroupSaves(GRAPH, 0, buffers)

    first(Save(Ref(0)), 1, torch.tensor([1.0]))
    second(Save(Ref(0)), 1, torch.tensor([2.0]))

    assert [saved.tensor.buffer for saved in (*first.tensors, *second.tensors)] == [0, 1]
