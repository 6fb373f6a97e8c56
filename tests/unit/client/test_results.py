"""Results give saved values by name and position, as tensors that share the received memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ndif_client.errors import NoValueError, ProtocolError, UnknownNameError
from ndif_client.results import RESERVED_NAMES, Layout, Result
from ndif_client.steps import Block
from ndif_client.wire.graph import Steps
from ndif_client.wire.messages import (
    Completion,
    Done,
    PromptTokens,
    SavedTensor,
    SavedTuple,
    Statistics,
)
from ndif_client.wire.tensors import ArrayKind, TensorSpec

STATISTICS = Statistics(queue_s=0.1, forward_s=0.2, forward=12, groups=3, tokens=40)


def _buffer(array: Any) -> memoryview:
    return memoryview(bytearray(array.tobytes()))


def _result(names: dict[str, Layout] | None = None, tensors: ArrayKind = "torch") -> Result:
    halves = np.array([1.0, 2.5, -3.0], dtype=np.float32)
    done = Done(
        id="x" * 32,
        prompts=[[PromptTokens([5, 6], ["a", "b"])]],
        tensors=[
            SavedTensor(3, "hidden", TensorSpec("float32", (1, 3), 0)),
            SavedTensor(7, None, TensorSpec("bfloat16", (3,), 3)),
        ],
        tuples=[
            SavedTuple(
                5,
                "top",
                ["values", "indices"],
                [TensorSpec("float32", (2,), 1), TensorSpec("int64", (2,), 2)],
            ),
            SavedTuple(9, None, [], [TensorSpec("float32", (2,), 1)]),
        ],
        statistics=STATISTICS,
    )
    buffers = [
        _buffer(halves),
        _buffer(np.array([9.0, 8.0], dtype=np.float32)),
        _buffer(np.array([4, 2], dtype=np.int64)),
        _buffer((halves.view(np.uint32) >> 16).astype(np.uint16)),
    ]
    default: dict[str, Layout] = {"hidden": 3, "top": 5, "all": [3, 7], "parts": {"a": 9}}
    return Result(done, buffers, default if names is None else names, tensors)


def test_a_value_is_found_by_name_attribute_and_position() -> None:
    result = _result()

    assert torch.equal(result["hidden"], torch.tensor([[1.0, 2.5, -3.0]]))
    assert result.hidden is result["hidden"] is result[0] is result[-4]
    assert list(result) == result.keys() == ["hidden", "top", "all", "parts"]
    assert len(result) == 4
    assert "top" in result
    assert dict(result).keys() == {"hidden", "top", "all", "parts"}


def test_a_name_may_stand_for_a_list_or_dict_of_values() -> None:
    result = _result()

    assert [value.dtype for value in result.all] == [torch.float32, torch.bfloat16]
    assert isinstance(result.parts["a"], tuple)


def test_several_results_of_one_operation_have_their_names() -> None:
    top = _result().top

    assert top.indices.tolist() == [4, 2]
    values, indices = top
    assert values is top.values
    assert indices is top[1]


def test_bfloat16_stays_bfloat16_for_torch_and_widens_exactly_for_numpy() -> None:
    assert _result().saved(7).dtype == torch.bfloat16
    widened = _result(tensors="numpy").saved(7)
    assert widened.dtype == np.float32
    assert widened.tolist() == [1.0, 2.5, -3.0]


def test_values_belong_to_the_caller() -> None:
    result = _result()

    result.hidden[0, 0] = 100

    assert result["hidden"][0, 0] == 100
    assert not result.hidden.requires_grad


def test_a_name_that_was_not_saved_is_explained() -> None:
    result = _result()

    with pytest.raises(KeyError, match="'hiden' was not saved; saved are"):
        result["hiden"]
    with pytest.raises(UnknownNameError, match="did you mean 'hidden'"):
        _ = result.hiden
    with pytest.raises(IndexError, match="result 4 of 4"):
        result[4]
    with pytest.raises(NoValueError, match=r"\.save\(\)"):
        result.saved(99)
    assert not hasattr(result, "__wrapped__")


def test_a_result_is_shown_with_shapes_and_without_numbers() -> None:
    assert repr(_result()) == "\n".join(
        [
            "Result(4 saved, forward 12 shared by 3)",
            "  hidden  float32[1, 3]",
            "  top     float32[2], int64[2]",
            "  all     list of 2",
            "  parts   dict of 1",
        ]
    )
    assert {"hidden", "statistics", "prompts"} <= set(dir(_result()))


def test_the_tokens_of_a_sole_prompt_are_at_hand() -> None:
    result = _result()
    assert result.tokens == ["a", "b"]
    assert result.token_ids == [5, 6]

    result.prompts.append(list(result.prompts[0]))
    with pytest.raises(NoValueError, match="2 prompts"):
        _ = result.tokens


def test_a_server_that_leaves_something_out_is_caught() -> None:
    with pytest.raises(ProtocolError, match="did not send 'mine' \\(node 4\\)"):
        _result({"mine": 4})


def test_only_steps_that_the_generation_has_reached_must_be_there() -> None:
    def result(block: Block, count: int) -> Result:
        spec = TensorSpec("float32", (1,), 0)
        done = Done(
            id="x" * 32,
            prompts=[],
            tensors=[SavedTensor(2, None, spec, 0)],
            statistics=STATISTICS,
            completions=[[Completion([1] * count, ["a"] * count, "a" * count, "eos")]],
        )
        return Result(done, [_buffer(np.ones(1, np.float32))], {"h": 2}, "numpy", {2: block})

    assert len(result(Block(Steps(), as_list=True), 1).h) == 1
    with pytest.raises(ProtocolError, match=r"did not send 'h' \(node 2, step 1\)"):
        result(Block(Steps(), as_list=True), 2)


def test_a_result_is_read_like_a_mapping() -> None:
    result = _result({"hidden": 3, "again": 3})

    assert result.values() == [result.hidden, result.hidden]
    assert dict(result.items()).keys() == {"hidden", "again"}
    assert result.get("hidden") is result.hidden
    assert result.get("nothing") is None
    assert result.get("nothing", 1) == 1
    assert result.steps("hidden") == [0]
    with pytest.raises(KeyError, match="'nothing' was not saved"):
        result.steps("nothing")


def test_every_public_attribute_of_a_result_is_a_reserved_name() -> None:
    public = {name for name in dir(_result()) if not name.startswith("_")}

    assert public - {"hidden", "top", "all", "parts"} == RESERVED_NAMES
