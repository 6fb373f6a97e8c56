"""Carries out a pass's stages: at layer boundaries, the packed row is laid out anew.

What flows from the layer before is taken from its rows; what the loop over the layers hands to
each of them again (rotary embeddings, positions) is taken from the rows that it began with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ndif_actor.engine import leaves
from ndif_actor.engine.attention import AttentionRecord
from ndif_actor.engine.batch import Packing
from ndif_actor.engine.depth import Rows
from ndif_actor.engine.layers import Boundary, LayerStack


@contextmanager
def changing_stages(
    model: torch.nn.Module,
    layers: LayerStack | None,
    packing: Packing,
    record: AttentionRecord,
    paused: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Within the block, a forward of the model goes through the stages of its packing.

    Args:
        model: the shard.
        layers: its boundaries; None if there is only one stage.
        packing: what is moved on.
        record: of the pass's attention, which changes with it.
        paused: whether a module is being called by a program now, on values of its own.
    """
    packing.current, record.layout = 0, packing.layouts[0]
    if layers is None or len(packing.stages) == 1:
        yield
        return
    first = packing.stages[1].region
    change = _Change(packing, record, paused)
    with ExitStack() as stack:
        for region, boundary in enumerate(layers.boundaries):
            if region >= first:
                module = model.get_submodule(boundary.path)
                stack.callback(change.hook(module, region, boundary).remove)
        yield


class _Change:
    """The hooks of one pass, and what they have already rearranged."""

    def __init__(
        self, packing: Packing, record: AttentionRecord, paused: Callable[[], bool]
    ) -> None:
        self._paused = paused
        self._packing = packing
        self._record = record
        self._again: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._indices: dict[tuple[int, bool], torch.Tensor] = {}

    def hook(self, module: torch.nn.Module, region: int, boundary: Boundary) -> Any:
        """Register the hook of one boundary, before all others."""

        def before(_: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
            changed = self._change(leaves.inputs(args, kwargs), region, boundary)
            return changed["args"], changed["kwargs"]

        def after(_: Any, args: Any, output: Any) -> Any:
            return self._change(output, region, boundary)

        if boundary.port == "input":
            return module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        return module.register_forward_hook(after, prepend=True)

    def _change(self, structure: Any, region: int, boundary: Boundary) -> Any:
        if self._paused():
            return structure
        moved = self._enter(region)
        for leaf, axis in boundary.token_axes.items():
            tensor = leaves.get(structure, leaf)
            if leaf != boundary.flow:
                structure = leaves.replace(structure, leaf, self._repeated(tensor, axis))
            elif moved:
                index = self._index(tensor.device, flowing=True)
                structure = leaves.replace(structure, leaf, tensor.index_select(axis, index))
        return structure

    def _enter(self, region: int) -> bool:
        """Go on to the stage that begins here, if one does."""
        following = self._packing.current + 1
        stages = self._packing.stages
        if following == len(stages) or stages[following].region != region:
            return False
        self._packing.current = following
        self._record.layout = self._packing.layouts[following]
        return True

    def _repeated(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Take the rows of now from a tensor that every layer is given as it was at first."""
        if self._packing.current == 0:
            return tensor
        key = id(tensor), self._packing.current
        if key not in self._again:
            rows = tensor.index_select(axis, self._index(tensor.device, flowing=False))
            self._again[key] = tensor, rows  # held, so that its id stays its own
        return self._again[key][1]

    def _index(self, device: torch.device, *, flowing: bool) -> torch.Tensor:
        key = self._packing.current, flowing
        if key not in self._indices:
            stage = self._packing.stages[self._packing.current]
            rows: Rows = stage.taken if flowing else stage.origin
            self._indices[key] = torch.from_numpy(rows).to(device)
        return self._indices[key]
