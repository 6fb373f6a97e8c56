"""The outer form of graphs: bounded, and each with bytes of its own only."""

from __future__ import annotations

import pytest

from ndif_actor.coordinator.screening import (
    MAX_NESTING,
    MAX_SAVES,
    check_protocol,
    own_buffers,
    screen,
)
from ndif_actor.errors import RequestError
from ndif_client.wire.graph import (
    Apply,
    Argument,
    Constant,
    Graph,
    HookPoint,
    Invoke,
    Items,
    Node,
    ReadHook,
    Ref,
    Save,
    Source,
    WriteHook,
)
from ndif_client.wire.messages import Submission, TraceRequest
from ndif_client.wire.tensors import TensorSpec


def constant(buffer: int, length: int = 4) -> Constant:
    return Constant(TensorSpec("uint8", (length,), buffer))


def nested(levels: int) -> Argument:
    argument: Argument = 1
    for _ in range(levels):
        argument = Items([argument])
    return argument


def test_saves_are_counted_and_bounded() -> None:
    nodes: list[Node] = [constant(0)]
    assert screen(Graph([*nodes, *([Save(Ref(0))] * MAX_SAVES)])) == MAX_SAVES

    with pytest.raises(RequestError, match=f"{MAX_SAVES + 1} saved values") as caught:
        screen(Graph([*nodes, *([Save(Ref(0))] * (MAX_SAVES + 1))]))
    assert caught.value.fault.kind == "limit"


@pytest.mark.parametrize("kind", ["args", "kwargs", "write"])
def test_an_argument_nested_too_deeply_is_refused_with_its_line(kind: str) -> None:
    def graph(levels: int) -> Graph:
        value = nested(levels)
        nodes: dict[str, Node] = {
            "args": Apply("stack", [value]),
            "kwargs": Apply("stack", [], {"tensors": value}),
            "write": WriteHook(HookPoint("lm_head", "output"), value),
        }
        return Graph([constant(0), nodes[kind]], [Source("a.py", 7)], [0, 0])

    assert screen(graph(MAX_NESTING)) == 0
    with pytest.raises(RequestError, match="lists within lists") as caught:
        screen(graph(MAX_NESTING + 1))
    assert caught.value.fault.node == 1
    assert caught.value.fault.source == Source("a.py", 7)


def test_a_request_gets_only_the_buffers_it_refers_to_each_once() -> None:
    buffers = [memoryview(bytes([number] * 4)) for number in range(4)]
    graph = Graph([constant(3), ReadHook(HookPoint("lm_head", "output")), constant(1), constant(3)])

    moved, own = own_buffers(graph, buffers)

    assert [buffer[0] for buffer in own] == [3, 1]
    kept = [node.tensor.buffer for node in moved.nodes if isinstance(node, Constant)]
    assert kept == [0, 1, 0]
    assert moved.nodes[1] is graph.nodes[1]


def test_a_graph_without_constants_is_left_as_it_is() -> None:
    graph = Graph([ReadHook(HookPoint("lm_head", "output"))])

    assert own_buffers(graph, [memoryview(b"x")]) == (graph, [])


@pytest.mark.parametrize(
    ("node", "words"), [(constant(2), "buffer 2"), (constant(0, 5), "5 bytes")]
)
def test_a_constant_without_its_bytes_is_refused(node: Constant, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        own_buffers(Graph([node], [Source("a.py", 3)], [0]), [memoryview(b"1234")])

    assert caught.value.fault.source == Source("a.py", 3)


def test_another_protocol_is_refused_with_both_versions() -> None:
    request = TraceRequest(id="abcdefgh", model="m", invokes=[Invoke(["hi"])], graph=Graph())

    check_protocol(Submission(requests=[request]))
    with pytest.raises(RequestError, match=r"version 99 of the protocol, this server 2"):
        check_protocol(Submission(requests=[request], protocol=99))
