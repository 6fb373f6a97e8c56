"""One shard's engine: loads its slice of the model and runs passes over ragged batches."""

from __future__ import annotations

from pathlib import Path

import torch

from ndif_actor.engine import adapter, shapes
from ndif_actor.engine.attention import attending
from ndif_actor.engine.batch import Batch, Rows, pack, pad
from ndif_actor.engine.blueprint import Blueprint
from ndif_actor.engine.cpu import has_native_half
from ndif_actor.engine.execution import Execution
from ndif_actor.engine.hookpoints import Moment, recording_moments
from ndif_actor.engine.interleaver import Interleaver
from ndif_actor.engine.layout import ShardGroup, learn_layouts
from ndif_actor.engine.linear import widen_linears
from ndif_actor.engine.probe import packing_fault, padding_fault
from ndif_actor.engine.saves import Allocate, GroupSaves, SaveBuffers
from ndif_actor.engine.sharded import ShardedModel
from ndif_actor.errors import ModelError, RequestError
from ndif_actor.messages import Group, GroupResult, Layout
from ndif_client.wire.messages import Fault

#: Tokens of the forward that shows how tensors lie across the shards.
_LAYOUT_TOKENS = 6


class Engine:
    """A loaded shard.

    Attributes:
        blueprint: the whole model without weights.
        unpackable: why requests can't share a forward, or None.
        unpaddable: why, besides, the prompts of one request must be equally long, or None.
        parameter_bytes: bytes of weights on this rank.
    """

    def __init__(
        self,
        model: ShardedModel,
        blueprint: Blueprint,
        rank: int,
        unpackable: str | None,
        unpaddable: str | None,
    ) -> None:
        self.blueprint = blueprint
        self.unpackable = unpackable
        self.unpaddable = unpaddable
        self.parameter_bytes = sum(_local_bytes(p) for p in model.model.parameters())
        self._model = model
        self._rank = rank

    @classmethod
    def load(
        cls, folder: Path, *, dtype: str, device: torch.device | str, rank: int, world_size: int
    ) -> Engine:
        """Load this rank's shard; all ranks call it together.

        Args:
            folder: the model, with safetensors weights.
            dtype: "float32", ..., or "auto".
            device: where this rank's slice goes.
            rank, world_size: of the replica; torch.distributed is up when there are several.

        Raises:
            ModelError: the model can't be served like that.
        """
        device = torch.device(device)
        blueprint = Blueprint.load(folder, dtype, world_size)
        model = adapter.load_shard(folder, blueprint.model.dtype, device, world_size)
        if device.type == "cpu" and world_size == 1 and not has_native_half():
            widen_linears(model)
        group = ShardGroup(rank, world_size)
        unpackable = blueprint.table.unpackable
        if unpackable is None:
            unpackable = packing_fault(model, blueprint.vocab_size, device)
        if unpackable is not None and world_size > 1:
            raise ModelError(f"{type(model).__name__} is served with --tp 1 only: {unpackable}")
        unpaddable = None
        if unpackable is not None:
            unpaddable = padding_fault(model, blueprint.vocab_size, device)
        layouts = {}
        if world_size > 1:
            layouts = learn_layouts(
                blueprint.table.sites.values(),
                _show_layout(model, device),
                _LAYOUT_TOKENS,
                adapter.shard_factors(model),
                group,
            )
        sharded = ShardedModel(model, group, layouts, device)
        return cls(sharded, blueprint, rank, unpackable, unpaddable)

    def run_pass(
        self, layout: Layout, groups: list[Group], buffers: list[memoryview], allocate: Allocate
    ) -> tuple[list[GroupResult], list[memoryview]]:
        """Run one forward for all groups, and their programs inside it.

        Args:
            layout: "packed", or "dense" for one padded request.
            groups: token ids and graphs.
            buffers: the bytes of all their constants.
            allocate: gives writable memory of that many bytes for a saved value.

        Returns:
            A result per group and the buffers it points to. Ranks other than 0 report only the
            groups that failed, without values.

        Raises:
            ReplicaLost: another shard is gone.
            torch.OutOfMemoryError: the pass does not fit on the device.
        """
        lay_out = pack if layout == "packed" else pad
        batch = lay_out([group.invokes for group in groups], self._model.device)
        saves = SaveBuffers(allocate)
        results: list[GroupResult] = []
        live: list[tuple[Group, Execution, GroupSaves]] = []
        for group, rows in zip(groups, batch.rows, strict=True):
            kept = GroupSaves(group.graph, saves)
            try:
                live.append((group, self._execution(group, rows, buffers, kept), kept))
            except RequestError as error:
                results.append(GroupResult(request=group.request, fault=error.fault))
        with torch.inference_mode():
            self._forward(batch, [execution for _, execution, _ in live])
        results += [self._result(*each) for each in live]
        if self._rank != 0:
            return [result for result in results if result.fault is not None], []
        return results, saves.buffers

    def _execution(
        self, group: Group, rows: list[Rows], buffers: list[memoryview], kept: GroupSaves
    ) -> Execution:
        program = self.blueprint.compile(group.graph, len(group.invokes))
        lengths = [[len(ids) for ids in prompts] for prompts in group.invokes]
        if self.unpaddable is not None and len({n for ns in lengths for n in ns}) > 1:
            message = (
                f"all prompts of a trace must have the same number of tokens: {self.unpaddable}"
            )
            raise RequestError(Fault(kind="execution", message=message))
        return Execution(
            program,
            rows,
            self._model,
            buffers,
            save=kept if self._rank == 0 else lambda node, number, value: None,
            infer=lambda: shapes.infer(program, self.blueprint.model, lengths),
        )

    def _forward(self, batch: Batch, executions: list[Execution]) -> None:
        interleaver = Interleaver(self._model.model, self.blueprint.table, executions)
        interleaver.begin()
        if not interleaver.needs_forward:
            return
        with attending(batch.segments), interleaver.hooked():
            if batch.attention_mask is None:
                adapter.run_packed(self._model.model, batch.input_ids, batch.position_ids)
            else:
                adapter.run_padded(
                    self._model.model, batch.input_ids, batch.position_ids, batch.attention_mask
                )

    def _result(self, group: Group, execution: Execution, kept: GroupSaves) -> GroupResult:
        if execution.fault is not None:
            return GroupResult(request=group.request, fault=execution.fault)
        return GroupResult(request=group.request, tensors=kept.tensors, tuples=kept.tuples)


def _show_layout(
    model: torch.nn.Module, device: torch.device
) -> dict[Moment, dict[str, torch.Tensor]]:
    """Run one packed forward and return every tensor this rank saw in it."""
    batch = pack([[[[0] * _LAYOUT_TOKENS]]], device)
    seen: dict[Moment, dict[str, torch.Tensor]] = {}
    with torch.inference_mode(), attending(batch.segments), recording_moments(model, seen):
        adapter.run_packed(model, batch.input_ids, batch.position_ids)  # type: ignore[arg-type]
    return seen


def _local_bytes(parameter: torch.nn.Parameter) -> int:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return int(local.numel() * local.element_size())
