"""Intervention graphs built by hand, for benchmarks that have no client."""

from __future__ import annotations

from collections.abc import Sequence

from ndif_client.wire.graph import (
    Apply,
    Dots,
    Graph,
    HookPoint,
    Items,
    Node,
    ReadHook,
    Ref,
    Save,
    Slice,
)

_LOGITS = HookPoint("lm_head", "output")


def save_layer(layer: int, logits: bool) -> Graph:
    """Return a graph that saves a layer's output, and the last token's logits if asked."""
    nodes: list[Node] = [ReadHook(HookPoint(f"model.layers.{layer}", "output")), Save(Ref(0))]
    if logits:
        last = Items([Slice(), -1])
        nodes += [ReadHook(_LOGITS), Apply("getitem", [Ref(2), last]), Save(Ref(3))]
    return Graph(nodes=nodes)


def read_logits(graph: Graph) -> Graph:
    """Return a graph that also needs the logits of all tokens, and does nothing with them."""
    return Graph(nodes=[*graph.nodes, ReadHook(_LOGITS)])


def touch(points: Sequence[HookPoint], save: bool) -> Graph:
    """Return a graph that reads hook points and at last the logits, and saves one number of those.

    Args:
        points: in the order they fire.
        save: save one number at each point as well.
    """
    nodes: list[Node] = []
    for point in (*points, _LOGITS):
        nodes.append(ReadHook(point))
        if save or point is _LOGITS:
            value = Ref(len(nodes) - 1)
            one = Items([Dots(), 0, 0])
            nodes += [Apply("getitem", [value, one]), Save(Ref(len(nodes)))]
    return Graph(nodes=nodes)


def arithmetic(points: Sequence[HookPoint], size: int) -> Graph:
    """Return a graph of `size` nodes that adds up means of what it reads, and saves the sum.

    Args:
        points: hook points whose values have at least one axis, in the order they fire; they are
            read evenly spread, and several times where there are too few.
        size: 6 at least.
    """
    count = (size - 2) // 3
    chosen = [points[number * len(points) // count] for number in range(count)]
    nodes: list[Node] = []
    total: Ref | None = None
    for point in chosen:
        nodes += [ReadHook(point), Apply("mean", [Ref(len(nodes))])]
        own = Ref(len(nodes) - 1)
        nodes.append(Apply("add", [own, own if total is None else total]))
        total = Ref(len(nodes) - 1)
    assert total is not None
    nodes += [Apply("neg", [total])] * (size - len(nodes) - 1)
    return Graph(nodes=[*nodes, Save(total)])
