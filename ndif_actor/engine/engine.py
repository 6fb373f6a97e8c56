"""One shard's engine: loads its slice of the model and runs passes over ragged batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import msgspec
import structlog
import torch
from torch.distributed.tensor import DTensor

from ndif_actor.engine import adapter, shapes
from ndif_actor.engine.attention import Attended, attending
from ndif_actor.engine.batch import Batch, Feeding, Packing, pack, pack_prompts, pad, pad_both
from ndif_actor.engine.blueprint import Blueprint
from ndif_actor.engine.cache import PAGE_TOKENS, KVCache, make_cache
from ndif_actor.engine.cpu import has_native_half
from ndif_actor.engine.execution import Execution, Logged, Saved
from ndif_actor.engine.gradients import differentiate
from ndif_actor.engine.held import HeldStore, Holdings
from ndif_actor.engine.interleaver import END_OF_FORWARD, Interleaver
from ndif_actor.engine.layout import Glimpse, Sharded, ShardGroup, learn_layouts
from ndif_actor.engine.linear import widen_linears
from ndif_actor.engine.members import Generation, Trace
from ndif_actor.engine.moments import Recording, recording_moments
from ndif_actor.engine.partials import partial_gradients
from ndif_actor.engine.probe import depth_fault, packing_fault, padding_fault
from ndif_actor.engine.program import BEFORE_FORWARD
from ndif_actor.engine.sampling import choose_all
from ndif_actor.engine.saves import Allocate, GroupSaves, SaveBuffers
from ndif_actor.engine.sharded import ShardedModel
from ndif_actor.engine.stages import changing_stages
from ndif_actor.errors import ModelError, RequestError
from ndif_actor.messages import Group, GroupResult, LogLine, Part, RunPass, Settle
from ndif_client.wire.graph import HookPoint
from ndif_client.wire.messages import Fault

#: Called with a line that a program has logged.
Tell = Callable[[LogLine], None]

_log = structlog.get_logger(__name__)

#: Tokens of the forward that shows how tensors lie across the shards.
_LAYOUT_TOKENS = 6


class Engine:
    """A loaded shard.

    Attributes:
        blueprint: the whole model without weights.
        unpackable: why requests can't share a forward, or None.
        unpaddable: why, besides, the prompts of one request must be equally long, or None.
        parameter_bytes: bytes of weights on this rank.
        withheld: hook points of the blueprint that the loaded model can't offer, by the reason.
    """

    def __init__(
        self,
        model: ShardedModel,
        blueprint: Blueprint,
        rank: int,
        unpackable: str | None,
        unpaddable: str | None,
        cache: KVCache | None,
        withheld: Mapping[HookPoint, str],
    ) -> None:
        self.blueprint = blueprint
        self.withheld: dict[str, list[HookPoint]] = {}
        for point, why in withheld.items():
            self.withheld.setdefault(why, []).append(point)
        self.unpackable = unpackable
        self.unpaddable = unpaddable
        self.parameter_bytes = sum(_local_bytes(p) for p in model.model.parameters())
        self.cache = cache
        self._model = model
        self._rank = rank
        self._generations: dict[str, Generation] = {}
        self._held = HeldStore()
        self._tell: Tell
        layers = blueprint.table.layers
        self._tail = layers.tail if layers is not None else 0

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        dtype: str,
        device: torch.device | str,
        rank: int,
        world_size: int,
        cache_bytes: int | None = None,
        shards_here: int = 1,
    ) -> Engine:
        """Load this rank's shard; all ranks call it together.

        Args:
            folder: the model, with safetensors weights.
            dtype: "float32", ..., or "auto".
            device: where this rank's slice goes.
            rank, world_size: of the replica; torch.distributed is up when there are several.
            cache_bytes: for the KV cache of this rank; None for a share of the free memory.
            shards_here: ranks on this machine.

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
        layouts: dict[HookPoint, Sharded] = {}
        partial: frozenset[HookPoint] = frozenset()
        withheld: dict[HookPoint, str] = {}
        cache = None
        if unpackable is not None:
            blueprint.close_attention()
            unpaddable = padding_fault(model, blueprint.vocab_size, device)
        else:
            layers = blueprint.table.layers
            if layers and (fault := depth_fault(model, layers, blueprint.vocab_size, device)):
                _log.warning("rows stay in the batch through all layers", reason=fault)
                blueprint.keep_rows()
            sites = blueprint.table.sites
            if world_size == 1:
                sites = {point: site for point, site in sites.items() if point.operation}
            seen = _show_layout(model, device, sites, world_size)
            layouts, withheld = learn_layouts(
                sites.values(), seen.tensors, _LAYOUT_TOKENS, adapter.shard_factors(model), group
            )
            blueprint.withhold(withheld)
            if world_size > 1:
                partial = partial_gradients(
                    model, blueprint.table.sites, layouts, group, blueprint.vocab_size, device
                )
            cache = make_cache(seen.attended, model.dtype, device, cache_bytes, shards_here)
        sharded = ShardedModel(model, group, layouts, partial, device, lambda: blueprint.flows)
        return cls(sharded, blueprint, rank, unpackable, unpaddable, cache, withheld)

    # ------------------------------------------------------------ passes

    def run_pass(
        self,
        message: RunPass,
        buffers: list[memoryview],
        allocate: Allocate,
        tell: Tell = lambda line: None,
    ) -> tuple[list[GroupResult], list[memoryview]]:
        """Run one forward for all members, and their programs inside it.

        Args:
            message: who joins, who goes on, and how the rows are laid out.
            buffers: the bytes of the constants of those that join.
            allocate: gives writable memory of that many bytes for a saved value.
            tell: called with each line that a program logs, on rank 0.

        Returns:
            A result per member and the buffers it points to. Ranks other than 0 report only the
            members that failed, without values.

        Raises:
            ReplicaLost: another shard is gone.
            torch.OutOfMemoryError: the pass does not fit on the device.
        """
        self._tell = tell
        saves = SaveBuffers(allocate)
        self._held.forget_waiting()
        results: list[GroupResult] = []
        differentiates = any(group.graph.differentiates for group in message.groups)
        with torch.enable_grad() if differentiates else torch.inference_mode():
            if message.layout == "dense":
                results = self._run_dense(message.groups, buffers, saves)
            else:
                traces, faults = self._join(message.groups, buffers)
                going_on = [
                    (self._generations[part.request], part)
                    for part in message.parts
                    if part.request in self._generations
                ]
                results = faults + self._run_packed(traces, going_on, saves)
        if self._rank != 0:
            return [result for result in results if result.fault is not None], []
        return results, saves.buffers

    def settle(self, message: Settle) -> None:
        """Hold what these requests have kept, and let go of what is dropped."""
        self._held.settle(message.kept, message.dropped)

    def forget(self, requests: Sequence[str]) -> None:
        """Drop what is left of generations that are over."""
        for request in requests:
            self._generations.pop(request, None)

    def swap_out(self, request: str) -> None:
        """Move a generation's KV cache to the host's memory."""
        if self.cache is not None and request in self._generations:
            self._generations[request].swap_out(self.cache)

    def swap_in(self, request: str, pages: Sequence[list[int]]) -> None:
        """Move a generation's KV cache back, into these pages of each sequence."""
        if self.cache is not None and request in self._generations:
            self._generations[request].swap_in(self.cache, pages)

    def _join(
        self, groups: Sequence[Group], buffers: list[memoryview]
    ) -> tuple[list[Trace], list[GroupResult]]:
        """Take groups in; return the traces among them, and results of those that can't run."""
        traces, faults = [], []
        for group in groups:
            try:
                execution = self._execution(group, buffers)
            except RequestError as error:
                faults.append(GroupResult(request=group.request, fault=error.fault))
                continue
            if group.decoding is None:
                traces.append(Trace(group, execution))
            else:
                self._generations[group.request] = Generation(
                    group, execution, PAGE_TOKENS, self._tail, self._model.device
                )
        return traces, faults

    def _execution(self, group: Group, buffers: list[memoryview]) -> Execution:
        steps = 1 if group.decoding is None else group.decoding.max_new_tokens
        program = self.blueprint.compile(group.graph, len(group.invokes), steps)
        lengths = [[len(ids) for ids in prompts] for prompts in group.invokes]
        decoder_lengths = [[len(ids) for ids in prompts] for prompts in group.decoder]
        model = self.blueprint.model
        return Execution(
            program,
            self._model,
            buffers,
            Holdings(self._held, group.scope, group.held),
            group.graph.seed,
            infer=lambda step: shapes.infer(
                program, model, lengths, steps, group.held, decoder_lengths
            ).at(step),
        )

    # ------------------------------------------------------------ packed

    def _run_packed(
        self,
        traces: Sequence[Trace],
        going_on: Sequence[tuple[Generation, Part]],
        saves: SaveBuffers,
    ) -> list[GroupResult]:
        for generation, part in going_on:
            assert self.cache is not None
            generation.feed(part, self.cache)
        members: list[Trace | Generation] = [*traces, *(generation for generation, _ in going_on)]
        feedings: list[Feeding] = []
        firsts = []
        for member in members:
            firsts.append(len(feedings))
            feedings += member.feedings()
        batch = pack(feedings, self._tail, self._model.device, self.cache)
        assert batch.packing is not None
        kept = []
        for member, first in zip(members, firsts, strict=True):
            kept.append(GroupSaves(member.graph, member.execution.step, saves))
            rows = member.rows(batch.packing, first)
            member.execution.join(rows, self._saver(kept[-1]), self._logger(member))
            if isinstance(member, Trace) or member.begins:
                member.execution.begin()
        executions = [member.execution for member in members]
        logits = self._forward(batch, executions, self._at_least(going_on))
        differentiate(executions, is_sharded=self._model.is_sharded)
        tokens = self._sample(members, firsts, batch.packing, logits)
        return [
            self._result(member, own, tokens.get(number))
            for number, (member, own) in enumerate(zip(members, kept, strict=True))
        ]

    def _at_least(self, going_on: Sequence[tuple[Generation, Part]]) -> int:
        """Return how far the forward must go for the generations in it."""
        if not going_on:
            return BEFORE_FORWARD
        layers = self.blueprint.table.layers
        if layers is None or any(generation.samples for generation, _ in going_on):
            return END_OF_FORWARD
        return layers.boundaries[layers.tail].order

    def _forward(
        self, batch: Batch, executions: list[Execution], at_least: int
    ) -> torch.Tensor | None:
        """Run the model; return the logits `[1, T, vocabulary]` if it ran to the end."""
        model, table = self._model.model, self.blueprint.table
        interleaver = Interleaver(model, table, executions, at_least)
        if not interleaver.needs_forward:
            return None
        assert batch.packing is not None
        output = None
        with (
            attending(None, self.cache) as record,
            changing_stages(model, table.layers, batch.packing, record, interleaver.paused),
            interleaver.hooked(),
        ):
            output = adapter.run_packed(model, batch.input_ids, batch.position_ids)
        return None if output is None else adapter.logits(output)

    def _sample(
        self,
        members: Sequence[Trace | Generation],
        firsts: Sequence[int],
        packing: Packing,
        logits: torch.Tensor | None,
    ) -> dict[int, dict[int, int]]:
        """Return the tokens made, by member and by its sequence."""
        chosen = [
            (number, sequence, row)
            for number, (member, first) in enumerate(zip(members, firsts, strict=True))
            if isinstance(member, Generation)
            for sequence, row in member.last_rows(packing, first)
        ]
        if not chosen or logits is None:
            return {}
        own = [members[number] for number, _, _ in chosen]
        continued = [g.sequences[s] for g, (_, s, _) in zip(own, chosen, strict=True)]  # type: ignore[union-attr]
        index = torch.tensor([row for _, _, row in chosen], device=logits.device)
        made = choose_all(
            [one.sampler for one in continued],
            logits[0].index_select(0, index),
            [one.ids for one in continued],
            [member.execution.step for member in own],
        )
        tokens: dict[int, dict[int, int]] = {}
        together = self._model.agreed(made).tolist()
        for (number, sequence, _), token in zip(chosen, together, strict=True):
            tokens.setdefault(number, {})[sequence] = token
        return tokens

    def _saver(self, kept: GroupSaves) -> Saved:
        return kept if self._rank == 0 else lambda node, number, value: None

    def _logger(self, member: Trace | Generation) -> Logged:
        def log(number: int, text: str) -> None:
            if self._rank == 0:
                self._tell(LogLine(member.request, number, member.execution.step, text))

        return log

    def _result(
        self, member: Trace | Generation, kept: GroupSaves, tokens: dict[int, int] | None
    ) -> GroupResult:
        made: list[int | None] = []
        if isinstance(member, Generation):
            made = member.advance(tokens or {})
        fault = member.execution.fault
        if fault is None:
            self._held.put_aside(member.request, member.execution.holdings)
        return GroupResult(
            request=member.request,
            tensors=kept.tensors,
            tuples=kept.tuples,
            tokens=[] if fault is not None else made,
            has_ended=member.execution.has_ended,
            kept=list(member.execution.holdings.kept),
            fault=fault,
        )

    # ------------------------------------------------------------ dense

    def _run_dense(
        self, groups: Sequence[Group], buffers: list[memoryview], saves: SaveBuffers
    ) -> list[GroupResult]:
        """Run the one request of a pass as a padded batch."""
        traces, faults = self._join(groups, buffers)
        if not traces:
            return faults
        (trace,) = traces
        (group,) = (group for group in groups if group.request == trace.request)
        if adapter.has_encoder_and_decoder(self.blueprint.model):
            batch, (own,) = pad_both([group.invokes], [group.decoder], self._model.device)
        else:
            batch, (own,) = pad([group.invokes], self._model.device)
        if self.unpaddable is not None and (_is_ragged(group.invokes) or _is_ragged(group.decoder)):
            message = (
                f"all prompts of a trace must have the same number of tokens: {self.unpaddable}"
            )
            fault = Fault(kind="execution", message=message)
            return [GroupResult(request=trace.request, fault=fault)]
        kept = GroupSaves(trace.graph, 0, saves)
        trace.execution.join(own, self._saver(kept), self._logger(trace))
        trace.execution.begin()
        model = self._model.model
        interleaver = Interleaver(model, self.blueprint.table, [trace.execution])
        if interleaver.needs_forward:
            assert batch.attention_mask is not None
            with attending(None), interleaver.hooked():
                adapter.run_padded(
                    model,
                    batch.input_ids,
                    batch.position_ids,
                    batch.attention_mask,
                    batch.decoder,
                )
        differentiate([trace.execution], is_sharded=False)
        return [self._result(trace, kept, None)]


def _is_ragged(invokes: Sequence[Sequence[Sequence[int]]]) -> bool:
    return len({len(ids) for prompts in invokes for ids in prompts}) > 1


class _Seen(msgspec.Struct):
    """What one packed forward of this rank showed."""

    tensors: Recording
    attended: list[Attended]


def _show_layout(
    model: torch.nn.Module, device: torch.device, sites: Collection[HookPoint], world_size: int
) -> _Seen:
    """Run one packed forward and note what this rank saw at these sites, and who attended."""
    batch = pack_prompts([[0] * _LAYOUT_TOKENS], device)
    assert batch.packing is not None
    tensors: Recording = {}

    def keep(point: HookPoint, tensor: torch.Tensor) -> Glimpse | None:
        # A module shows plain tensors; inside of it, its own sharded parameters may be at work.
        if point not in sites or (point.operation and isinstance(tensor, DTensor)):
            return None
        return Glimpse.of(tensor, marked=bool(point.operation) and world_size > 1)

    with (
        torch.inference_mode(),
        attending(batch.packing.layouts[0]) as record,
        recording_moments(model, tensors, keep),
    ):
        adapter.run_packed(model, batch.input_ids, batch.position_ids)  # type: ignore[arg-type]
    return _Seen(tensors, record.attended)


def _local_bytes(parameter: torch.nn.Parameter) -> int:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return int(local.numel() * local.element_size())
