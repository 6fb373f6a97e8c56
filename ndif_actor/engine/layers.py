"""The decoder layers of a model: the places in a forward where the packed row can be laid out anew.

Between two layers nothing of a forward is alive but the residual stream, which flows from layer to
layer, and what the loop hands to each layer again (rotary embeddings, positions). So there rows
can leave the batch or be copied: copied as soon as a layer has made its output, so that a write of
it comes late, and left behind when the next layer begins, so that a read of it comes in time.
Found in recordings of the model without weights, as hook points are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise

import msgspec

from ndif_actor.engine.moments import Moment, Recording
from ndif_client.wire.graph import Port


class Boundary(msgspec.Struct, frozen=True):
    """The input or the output of a decoder layer, or the input of what follows the last one.

    Attributes:
        path: of the module.
        port: which of the two.
        order: position of its moment in the forward.
        flow: leaf of the tensor that flows from layer to layer.
        token_axes: the token axis of every tensor to be laid out anew, by leaf.
    """

    path: str
    port: Port
    order: int
    flow: str
    token_axes: dict[str, int]


class LayerStack(msgspec.Struct, frozen=True):
    """The boundaries of a model, in the order of the forward: two a layer, and one after all.

    A forward falls into *regions*: region r begins at boundary r. Region 2k is the inside of layer
    k, region 2k + 1 the moment of its output, before layer k + 1 begins; the last region is the
    tail (final norm and language-model head). Region -1 lies before the first layer.
    """

    boundaries: tuple[Boundary, ...]

    @property
    def tail(self) -> int:
        """The region after the last layer."""
        return len(self.boundaries) - 1

    @property
    def num_layers(self) -> int:
        return self.tail // 2

    def region(self, order: int) -> int:
        """Return the region in which the moment at `order` fires."""
        return bisect_right(self.boundaries, order, key=lambda boundary: boundary.order) - 1


def find_layers(
    moments: Mapping[Moment, int],
    packed: Sequence[Recording],
    attention: frozenset[str],
) -> LayerStack | None:
    """Return the layers of a model, or None if its rows must stay as they are in all of them.

    Args:
        moments: position of each moment in the forward.
        packed: two recordings of a packed row, of different lengths.
        attention: paths of the modules that attend; there is at least one in each layer.
    """
    paths = _layer_paths(attention)
    if not paths or len(packed) != 2:
        return None
    inputs = [Moment(path, "input", 0) for path in paths]
    outputs = [Moment(path, "output", 0) for path in paths]
    if any(moment not in moments for moment in (*inputs, *outputs)):
        return None
    spans = [(moments[i], moments[o]) for i, o in zip(inputs, outputs, strict=True)]
    if any(before[1] >= after[0] for before, after in pairwise(spans)):
        return None
    entered_later = (
        moment
        for moment, at in moments.items()
        if at > spans[-1][1] and moment.port == "input" and not moment.operation
    )
    after = next(entered_later, None)
    if after is None:
        return None
    boundaries: list[Boundary] = []
    for entered, left in zip([*inputs, after], [None, *outputs], strict=True):
        axes = _token_axes(packed, entered)
        flow, flowed = "", ""
        if left is not None:
            flow, flowed = _same_tensor(packed[0], left, entered)
            made = _token_axes(packed, left)
            if flow not in axes or flowed not in made:
                return None
            output = {flowed: made[flowed]}
            boundaries.append(Boundary(left.path, "output", moments[left], flowed, output))
        boundaries.append(Boundary(entered.path, "input", moments[entered], flow, axes))
    # The first layer takes what the others take.
    first, second = boundaries[0], boundaries[2]
    flow = second.flow if second.flow in first.token_axes else "args.0"
    if flow not in first.token_axes:
        return None
    boundaries[0] = msgspec.structs.replace(first, flow=flow)
    return LayerStack(tuple(boundaries))


def _layer_paths(attention: frozenset[str]) -> list[str]:
    """Return the paths of the numbered modules that hold one attention each, by number."""
    layers: dict[str, set[int]] = {}
    for path in attention:
        steps = path.split(".")
        number = next((i for i, step in enumerate(steps) if step.isdigit()), None)
        if number is None:
            return []
        layers.setdefault(".".join(steps[:number]), set()).add(int(steps[number]))
    if len(layers) != 1:
        return []
    ((owner, numbers),) = layers.items()
    if numbers != set(range(len(numbers))):
        return []
    return [f"{owner}.{number}" for number in sorted(numbers)]


def _token_axes(packed: Sequence[Recording], moment: Moment) -> dict[str, int]:
    first, second = (run.get(moment, {}) for run in packed)
    axes = {}
    for leaf, tensor in first.items():
        if leaf not in second or second[leaf].dim() != tensor.dim():
            continue
        sizes = zip(tensor.shape, second[leaf].shape, strict=True)
        varying = [axis for axis, pair in enumerate(sizes) if len(set(pair)) > 1]
        if len(varying) == 1:
            axes[leaf] = varying[0]
    return axes


def _same_tensor(run: Recording, left: Moment, entered: Moment) -> tuple[str, str]:
    """Return the leaves at which a tensor that `left` one module `entered` the next, if any."""
    made = {id(tensor): leaf for leaf, tensor in run.get(left, {}).items()}
    found = ((leaf, made[id(t)]) for leaf, t in run.get(entered, {}).items() if id(t) in made)
    return next(found, ("", ""))
