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
