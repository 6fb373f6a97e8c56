"""Intervention graphs built by hand, for benchmarks that have no client."""

from __future__ import annotations

from collections.abc import Sequence

from ndif_client.wire.graph import (
    Apply,
    Constant,
    Dots,
    Dtype,
    Graph,
    HookPoint,
    Items,
    Node,
    ReadHook,
    Ref,
    Save,
    Slice,
    WriteHook,
)
from ndif_client.wire.tensors import TensorSpec

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


def adapt(
    places: Sequence[tuple[str, int, int]], rank: int, first_buffer: int, *, by_hand: bool
) -> Graph:
    """Return a graph that adds a low-rank adapter to linear modules and saves a logit.

    Args:
        places: the modules in the order they fire, with the sizes of what enters and leaves them.
        rank: of the adapter; its factors are constants, two buffers for each module.
        first_buffer: of them.
        by_hand: write the products out, as operations of their own.
    """
    nodes: list[Node] = []

    def add(node: Node) -> Ref:
        nodes.append(node)
        return Ref(len(nodes) - 1)

    for number, (path, size_in, size_out) in enumerate(places):
        buffer = first_buffer + 2 * number
        down = add(Constant(TensorSpec("float32", (rank, size_in), buffer)))
        up = add(Constant(TensorSpec("float32", (size_out, rank), buffer + 1)))
        entered = add(ReadHook(HookPoint(path, "input", "args.0")))
        output = HookPoint(path, "output")
        if by_hand:
            wide = add(Apply("to", [entered, Dtype("float32")]))
            low = add(Apply("matmul", [wide, add(Apply("transpose", [down, 0, 1]))]))
            update = add(Apply("matmul", [low, add(Apply("transpose", [up, 0, 1]))]))
            own = add(ReadHook(output))
            changed = add(Apply("type_as", [add(Apply("add", [own, update])), own]))
        else:
            changed = add(Apply("low_rank", [add(ReadHook(output)), entered, down, up]))
        add(WriteHook(output, changed))
    logits = add(ReadHook(_LOGITS))
    add(Save(add(Apply("getitem", [logits, Items([Dots(), -1, 0])]))))
    return Graph(nodes=nodes)
