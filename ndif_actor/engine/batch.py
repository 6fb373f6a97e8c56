"""The ragged batch: which rows of a forward belong to whom, and each owner's view of them.

Packed, all sequences lie end to end in one row `[1, T]`, without padding; how they lie may change
from region to region of the forward (`depth`). Padded, the prompts of one request form an ordinary
left-padded rectangle; that is how a model that can't be packed is served. A program sees a tensor
only through the `Rows` of its own request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Protocol

import msgspec
import numpy as np
import torch

from ndif_actor.engine.attention import (
    AttentionLayout,
    Chunk,
    Decodes,
    KeptRows,
    Segments,
)
from ndif_actor.engine.cache import KVCache
from ndif_actor.engine.depth import Block, Stage, Strand, lay_out
from ndif_actor.engine.hookpoints import Site
from ndif_actor.engine.internals import Squares, fill_squares, stack_squares

#: Token ids: per group, per invoke, per prompt.
TokenIds = Sequence[Sequence[Sequence[Sequence[int]]]]

#: Sequences share one attention call while the longest has at most this many times the tokens of
#: the shortest, and some more.
_BUCKET_RATIO, _BUCKET_SLACK = 2, 64


class Rows(Protocol):
    """The rows of one invoke in the tensors of a pass.

    Attributes:
        lengths: how many each sequence has.
        totals: how many it has together with its past.
    """

    lengths: Sequence[int]
    totals: Sequence[int]

    def shape(self, site: Site) -> tuple[int, ...]:
        """Return the shape the user sees at a hook point."""
        ...

    def blocks(self) -> list[tuple[int, int]]:
        """Return first row and length of each sequence in the packed row, as it lies now."""
        ...

    def now(self) -> Rows:
        """Return the same rows as they lie now, also when the forward has gone on."""
        ...

    def read(self, tensor: torch.Tensor | Squares, site: Site) -> torch.Tensor:
        """Return the rows as the user sees them, left-padded with zeros where lengths differ.

        Rows that nobody looks at may be zeros too. The result may share memory with `tensor`.
        """
        ...

    def write(self, tensor: torch.Tensor | Squares, site: Site, value: torch.Tensor) -> None:
        """Overwrite the rows in `tensor`; padding of `value` is dropped."""
        ...


class Feeding(msgspec.Struct, frozen=True):
    """One sequence's tokens in a pass.

    Attributes:
        ids: the tokens fed.
        strand: how many these are, and how deep they are needed.
        pages: of the KV cache, for all of the sequence's tokens, these included; None without one.
    """

    ids: Sequence[int]
    strand: Strand
    pages: Sequence[int] | None = None


class Packing:
    """How a packed row lies in each stage of a pass, and which stage it is in now."""

    def __init__(self, stages: Sequence[Stage], layouts: Sequence[AttentionLayout]) -> None:
        self.stages = stages
        self.layouts = layouts
        self.current = 0
        self._blocks = [
            {member: block for block in stage.blocks for member in block.members}
            for stage in stages
        ]

    def block(self, strand: int, stage: int) -> Block:
        """Return where a strand lies in a stage."""
        return self._blocks[stage][strand]


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """One forward's input.

    `input_ids` and `position_ids` are `[1, T]` (packed) or `[prompts, longest]` (padded);
    `attention_mask` is None while packed, `packing` is None otherwise. `decoder` has the ids and
    the mask that a decoder reads beside an encoder, `[prompts, longest]` of its own.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    packing: Packing | None = None
    decoder: tuple[torch.Tensor, torch.Tensor] | None = None


class PackedRows:
    """Some strands of a packed row, `lengths` tokens each.

    Args:
        packing: how the row lies.
        strands, lengths: of each sequence.
        totals: its tokens with those of its past; None where it has none.
    """

    def __init__(
        self,
        packing: Packing,
        strands: Sequence[int],
        lengths: Sequence[int],
        totals: Sequence[int] | None = None,
    ) -> None:
        self.lengths = lengths
        self.totals = lengths if totals is None else totals
        self._packing = packing
        self._strands = strands
        self._stage: int | None = None
        self._known: tuple[int, list[Block], bool] | None = None

    def now(self) -> PackedRows:
        still = PackedRows(self._packing, self._strands, self.lengths, self.totals)
        still._stage = self._packing.current
        return still

    def shape(self, site: Site) -> tuple[int, ...]:
        return site.shape_for(len(self.lengths), max(self.lengths), max(self.totals))

    def blocks(self) -> list[tuple[int, int]]:
        return [(block.start, block.length) for block in self._place()[0]]

    def read(self, tensor: torch.Tensor | Squares, site: Site) -> torch.Tensor:
        blocks, adjacent = self._place()
        if isinstance(tensor, Squares):
            return stack_squares([tensor.blocks[block.start] for block in blocks])
        if adjacent:
            return self._view(tensor, site, blocks[0].start)
        shape = site.shape_for(len(self.lengths), max(self.lengths))
        # Under tensor parallelism `tensor` may be a shard: its own sizes count, not the site's.
        shape = tuple(
            n if isinstance(name, str) else own
            for n, name, own in zip(shape, site.shape, tensor.shape, strict=True)
        )
        padded = tensor.new_zeros(shape)
        for target, source in self._pairs(padded, tensor, site, blocks):
            target.copy_(source)
        return padded

    def write(self, tensor: torch.Tensor | Squares, site: Site, value: torch.Tensor) -> None:
        blocks, adjacent = self._place()
        if isinstance(tensor, Squares):
            fill_squares([tensor.blocks[block.start] for block in blocks], value)
            return
        if adjacent:
            self._view(tensor, site, blocks[0].start).copy_(value)
            return
        for source, target in self._pairs(value, tensor, site, blocks):
            target.copy_(source)

    def _place(self) -> tuple[list[Block], bool]:
        """Return the blocks now, and whether they are whole, equally long and end to end."""
        stage = self._packing.current if self._stage is None else self._stage
        if self._known is None or self._known[0] != stage:
            blocks = [self._packing.block(strand, stage) for strand in self._strands]
            length, start = self.lengths[0], blocks[0].start
            adjacent = all(
                block.count == n == length and block.start == start + i * length
                for i, (block, n) in enumerate(zip(blocks, self.lengths, strict=True))
            )
            self._known = stage, blocks, adjacent
        return self._known[1], self._known[2]

    def _view(self, tensor: torch.Tensor, site: Site, start: int) -> torch.Tensor:
        count, length = len(self.lengths), self.lengths[0]
        rows = tensor.narrow(site.token_axis, start, count * length)
        if site.batch_axis is None or count == 1:
            return rows
        tokens = site.token_axis - 1
        split = rows.squeeze(site.batch_axis).unflatten(tokens, (count, length))
        return split.movedim(tokens, site.batch_axis)

    def _pairs(
        self, padded: torch.Tensor, packed: torch.Tensor, site: Site, blocks: Sequence[Block]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each prompt's real tokens in the padded and in the packed tensor."""
        longest, axis = max(self.lengths), site.token_axis
        for i, (block, length) in enumerate(zip(blocks, self.lengths, strict=True)):
            row = packed.narrow(axis, block.start, block.count)
            mine, first = padded, (i + 1) * longest - length
            if site.batch_axis is not None:
                mine, first = padded.narrow(site.batch_axis, i, 1), longest - length
            if block.positions is None:
                yield mine.narrow(axis, first, length), row
                continue
            for j, position in enumerate(block.positions):
                yield mine.narrow(axis, first + position, 1), row.narrow(axis, j, 1)


class PaddedRows:
    """Prompts `first` to `first + len(lengths)` of a left-padded batch `[prompts, longest]`."""

    def __init__(self, first: int, lengths: Sequence[int], prompts: int, longest: int) -> None:
        self.first = first
        self.lengths = self.totals = lengths
        self._prompts = prompts
        self._longest = longest

    def now(self) -> PaddedRows:
        return self

    def shape(self, site: Site) -> tuple[int, ...]:
        return site.shape_for(len(self.lengths), max(self.lengths))

    def blocks(self) -> list[tuple[int, int]]:
        return []

    def read(self, tensor: torch.Tensor | Squares, site: Site) -> torch.Tensor:
        assert isinstance(tensor, torch.Tensor)
        if site.square:
            return stack_squares(self._squares(tensor))
        rows = self._rows(tensor, site)
        if min(self.lengths) < max(self.lengths):
            padded = torch.zeros_like(rows)
            self._copy(rows, padded, site)
            rows = padded
        if site.batch_axis is None:
            return rows.flatten(site.token_axis, site.token_axis + 1)
        return rows

    def write(self, tensor: torch.Tensor | Squares, site: Site, value: torch.Tensor) -> None:
        assert isinstance(tensor, torch.Tensor)
        if site.square:
            fill_squares(self._squares(tensor), value)
            return
        if site.batch_axis is None:
            value = value.unflatten(site.token_axis, (len(self.lengths), max(self.lengths)))
        self._copy(value, self._rows(tensor, site), site)

    def _squares(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """View what belongs to pairs of real tokens, for each prompt."""
        return [
            tensor[self.first + i, :, -length:, -length:] for i, length in enumerate(self.lengths)
        ]

    def _rows(self, tensor: torch.Tensor, site: Site) -> torch.Tensor:
        """View the prompts, with axes of their own for prompts and tokens."""
        prompts, tokens = self._axes(site)
        if site.batch_axis is None:
            tensor = tensor.unflatten(site.token_axis, (self._prompts, self._longest))
        longest = max(self.lengths)
        rows = tensor.narrow(prompts, self.first, len(self.lengths))
        return rows.narrow(tokens, self._longest - longest, longest)

    def _copy(self, source: torch.Tensor, target: torch.Tensor, site: Site) -> None:
        """Copy the real tokens, and no padding."""
        prompts, tokens = self._axes(site)
        longest = max(self.lengths)
        for i, length in enumerate(self.lengths):
            real = [
                rows.narrow(prompts, i, 1).narrow(tokens, longest - length, length)
                for rows in (source, target)
            ]
            real[1].copy_(real[0])

    @staticmethod
    def _axes(site: Site) -> tuple[int, int]:
        if site.batch_axis is None:
            return site.token_axis, site.token_axis + 1
        return site.batch_axis, site.token_axis


class EncoderDecoderRows:
    """The rows of an invoke in an encoder and in a decoder, padded each for itself.

    `lengths` are those of the encoder.
    """

    def __init__(self, encoder: Rows, decoder: Rows) -> None:
        self.lengths = self.totals = encoder.lengths
        self._encoder = encoder
        self._decoder = decoder

    def now(self) -> EncoderDecoderRows:
        return self

    def shape(self, site: Site) -> tuple[int, ...]:
        return self._at(site).shape(site)

    def blocks(self) -> list[tuple[int, int]]:
        return []

    def read(self, tensor: torch.Tensor | Squares, site: Site) -> torch.Tensor:
        return self._at(site).read(tensor, site)

    def write(self, tensor: torch.Tensor | Squares, site: Site, value: torch.Tensor) -> None:
        self._at(site).write(tensor, site, value)

    def _at(self, site: Site) -> Rows:
        return self._decoder if site.in_decoder else self._encoder


def pack(
    feedings: Sequence[Feeding], tail: int, device: torch.device, cache: KVCache | None = None
) -> Batch:
    """Lay all sequences end to end, those side by side that can attend in one call.

    Args:
        feedings: a strand each, numbered as they come.
        tail: the number of the region after the last layer.
        device: of the model.
        cache: where sequences with pages have theirs.
    """
    stages = lay_out([feeding.strand for feeding in feedings], tail)
    input_ids: list[int] = []
    position_ids: list[int] = []
    for block in stages[0].blocks:
        feeding = feedings[block.members[0]]
        past = feeding.strand.past
        input_ids += feeding.ids
        position_ids += range(past, past + block.length)
    attention = _Attention(feedings, cache)
    return Batch(
        input_ids=torch.tensor([input_ids], device=device),
        position_ids=torch.tensor([position_ids], device=device),
        packing=Packing(stages, [attention.layout(stage) for stage in stages]),
    )


def pack_prompts(prompts: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """Lay prompts end to end, all of them through the whole model, the shortest first."""
    feedings = [Feeding(ids, Strand(length=len(ids), last=0)) for ids in prompts]
    return pack(feedings, 0, device)


class _Attention:
    """Makes the layout of each stage; what does not change from stage to stage is made once."""

    def __init__(self, feedings: Sequence[Feeding], cache: KVCache | None) -> None:
        self._feedings = feedings
        self._cache = cache
        self._slots: dict[int, torch.Tensor] = {}
        self._tables: dict[tuple[int, ...], tuple[torch.Tensor, list[int]]] = {}

    def layout(self, stage: Stage) -> AttentionLayout:
        fresh: list[Block] = []
        past: list[Block] = []
        for block in stage.blocks:
            strand = self._feedings[block.members[0]].strand
            (past if strand.past else fresh).append(block)
        segments = []
        for length, same in groupby(fresh, key=lambda block: block.length):
            blocks = list(same)
            segments.append(Segments(blocks[0].start, len(blocks), length))
        singles = [block for block in past if block.length == 1]
        return AttentionLayout(
            fresh=segments,
            chunks=[self._chunk(block) for block in past if block.length > 1],
            decodes=[self._decodes(bucket) for bucket in self._buckets(singles)],
            kept=self._kept(stage.blocks),
        )

    def _chunk(self, block: Block) -> Chunk:
        (member,) = block.members
        return Chunk(block.start, block.length, self._all_slots(member))

    def _buckets(self, blocks: Sequence[Block]) -> Iterator[list[Block]]:
        bucket: list[Block] = []
        for block in blocks:
            past = self._past(block)
            if bucket and past > _BUCKET_RATIO * self._past(bucket[0]) + _BUCKET_SLACK:
                yield bucket
                bucket = []
            bucket.append(block)
        if bucket:
            yield bucket

    def _past(self, block: Block) -> int:
        return self._feedings[block.members[0]].strand.past

    def _decodes(self, bucket: Sequence[Block]) -> Decodes:
        members = tuple(block.members[0] for block in bucket)
        if members not in self._tables:
            assert self._cache is not None
            feedings = [self._feedings[member] for member in members]
            lengths = [feeding.strand.past + 1 for feeding in feedings]
            table = self._cache.table([feeding.pages or [] for feeding in feedings])
            slots = table[:, : max(lengths)].contiguous()
            self._tables[members] = slots, lengths
        return Decodes(bucket[0].start, *self._tables[members])

    def _kept(self, blocks: Sequence[Block]) -> KeptRows | None:
        rows, slots = [], []
        for block in blocks:
            for member in block.members:
                if self._feedings[member].pages is None:
                    continue
                rows.append(np.arange(block.start, block.start + block.length))
                slots.append(self._all_slots(member)[-block.length :])
        if not rows:
            return None
        places = torch.cat(slots)
        return KeptRows(torch.from_numpy(np.concatenate(rows)).to(places.device), places)

    def _all_slots(self, member: int) -> torch.Tensor:
        if member not in self._slots:
            feeding = self._feedings[member]
            assert self._cache is not None and feeding.pages is not None
            total = feeding.strand.past + feeding.strand.length
            self._slots[member] = self._cache.slots(feeding.pages)[:total]
        return self._slots[member]


def pad(groups: TokenIds, device: torch.device) -> tuple[Batch, list[list[Rows]]]:
    """Lay the prompts of all groups out as one left-padded rectangle, and show each its rows."""
    prompts = [ids for invokes in groups for invoke in invokes for ids in invoke]
    longest = max(map(len, prompts), default=0)
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    rows: list[list[Rows]] = []
    first = 0
    for invokes in groups:
        rows.append([])
        for invoke in invokes:
            lengths = list(map(len, invoke))
            rows[-1].append(PaddedRows(first, lengths, len(prompts), longest))
            first += len(invoke)
    batch = Batch(
        input_ids=input_ids.to(device),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
        attention_mask=mask.to(device),
    )
    return batch, rows


def pad_both(
    groups: TokenIds, decoder: TokenIds, device: torch.device
) -> tuple[Batch, list[list[Rows]]]:
    """Lay out what an encoder and a decoder read as `pad` does, each as a rectangle of its own."""
    batch, rows = pad(groups, device)
    other, decoder_rows = pad(decoder, device)
    assert other.attention_mask is not None
    both: list[list[Rows]] = [
        [EncoderDecoderRows(*sides) for sides in zip(*invokes, strict=True)]
        for invokes in zip(rows, decoder_rows, strict=True)
    ]
    decoder_inputs = other.input_ids, other.attention_mask
    return msgspec.structs.replace(batch, decoder=decoder_inputs), both


def padding_mask(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return `[prompts, longest]` int64: 1 for real tokens, 0 for left padding."""
    longest = max(lengths)
    columns = torch.arange(longest, device=device)
    starts = torch.tensor([longest - n for n in lengths], device=device)
    return (columns >= starts[:, None]).long()
