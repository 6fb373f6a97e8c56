"""What is remembered of graphs, and what is not."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from msgspec.structs import replace

from ndif_actor.engine import adapter
from ndif_actor.engine.blueprint import Blueprint
from ndif_actor.engine.memo import Memo
from ndif_actor.errors import RequestError
from ndif_client.wire.graph import Graph, HookPoint, ReadHook, Ref, Save, Source
from tests.models import CONFIGS

MISSING = ReadHook(HookPoint("model.layers.9", "output"))
HIDDEN = HookPoint("model.layers.1", "output")


@cache
def blueprint() -> Blueprint:
    model = adapter.build_without_weights(CONFIGS["llama"](), torch.float32)
    return Blueprint(model, world_size=1)


def graph(point: HookPoint = HIDDEN, line: int = 1) -> Graph:
    sources = [Source("program.py", line)]
    return Graph([ReadHook(point), Save(Ref(0))], sources=sources, at=[0, 0])


def test_the_latest_are_remembered_and_errors_are_not() -> None:
    memo: Memo[list[int]] = Memo()
    first = memo.get("a", lambda: [1])
    assert memo.get("a", lambda: [2]) is first

    for number in range(127):
        memo.get(number, lambda: [3])
    assert memo.get("a", lambda: [4]) is first
    memo.get("b", lambda: [5])
    assert memo.get(0, lambda: [6]) == [6]
    memo.clear()
    assert memo.get("a", lambda: [7]) == [7]

    with pytest.raises(ZeroDivisionError):
        memo.get("c", lambda: [1 // 0])
    assert memo.get("c", lambda: [8]) == [8]


def test_what_is_long_is_not_remembered() -> None:
    memo: Memo[list[int]] = Memo()
    memo.get("x" * 300_000, lambda: [1])
    assert memo.get("x" * 300_000, lambda: [2]) == [2]


def test_an_equal_graph_is_compiled_once_and_one_of_another_line_by_itself() -> None:
    first = blueprint().compile(graph(), 1)
    assert blueprint().compile(replace(graph(), seed=5), 1) is first
    assert blueprint().compile(graph(), 2) is not first
    assert blueprint().compile(graph(), 1, 2) is not first

    for line in (3, 4, 3):
        with pytest.raises(RequestError) as refused:
            blueprint().check(replace(graph(line=line), nodes=[MISSING, Save(Ref(0))]), [[2]], [])
        assert refused.value.fault.source == Source("program.py", line)


def test_the_price_of_an_equal_graph_depends_on_its_prompts() -> None:
    prices = [blueprint().check(graph(), [[length]], []) for length in (2, 5, 2)]
    assert [price.saved_bytes for price in prices] == [384, 960, 384]
    assert prices[0] is prices[2]


def test_what_is_withheld_is_refused_though_it_was_allowed_before() -> None:
    own = blueprint.__wrapped__()
    own.check(graph(), [[2]], [])
    own.withhold({HIDDEN: "nobody may"})
    with pytest.raises(RequestError, match="nobody may"):
        own.check(graph(), [[2]], [])
