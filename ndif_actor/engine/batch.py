"""The ragged batch: which rows of a forward belong to whom, and each owner's view of them.

Packed, all prompts lie end to end in one row `[1, T]`, without padding. Padded, the prompts of one
request form an ordinary left-padded rectangle; that is how a model that can't be packed is served.
A program sees a tensor only through the `Rows` of its own request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Protocol

import msgspec
import torch

from ndif_actor.engine.attention import Segments
from ndif_actor.engine.hookpoints import Site

#: Token ids: per group, per invoke, per prompt.
TokenIds = Sequence[Sequence[Sequence[Sequence[int]]]]


class Rows(Protocol):
    """The rows of one invoke in the tensors of a pass."""

    lengths: Sequence[int]

    def read(self, tensor: torch.Tensor, site: Site) -> torch.Tensor:
        """Return the rows as the user sees them, left-padded with zeros where lengths differ.

        The result may share memory with `tensor`.
        """
        ...

    def write(self, tensor: torch.Tensor, site: Site, value: torch.Tensor) -> None:
        """Overwrite the rows in `tensor`; padding of `value` is dropped."""
        ...


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """One forward's input, and the rows of each invoke of each group.

    `input_ids` and `position_ids` are `[1, T]` (packed) or `[prompts, longest]` (padded).
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    segments: list[Segments] | None
    rows: list[list[Rows]]


class PackedRows:
    """Prompts at `starts` of a packed row."""

    def __init__(self, starts: Sequence[int], lengths: Sequence[int]) -> None:
        self.starts = starts
        self.lengths = lengths
        length = lengths[0]
        self._adjacent = all(
            n == length and start == starts[0] + i * length
            for i, (start, n) in enumerate(zip(starts, lengths, strict=True))
        )

    def read(self, tensor: torch.Tensor, site: Site) -> torch.Tensor:
        if self._adjacent:
            return self._view(tensor, site)
        shape = site.shape_for(len(self.lengths), max(self.lengths))
        # Under tensor parallelism `tensor` may be a shard: its own sizes count, not the site's.
        shape = tuple(
            n if isinstance(name, str) else own
            for n, name, own in zip(shape, site.shape, tensor.shape, strict=True)
        )
        padded = tensor.new_zeros(shape)
        for target, source in self._pairs(padded, tensor, site):
            target.copy_(source)
        return padded

    def write(self, tensor: torch.Tensor, site: Site, value: torch.Tensor) -> None:
        if self._adjacent:
            self._view(tensor, site).copy_(value)
            return
        for source, target in self._pairs(value, tensor, site):
            target.copy_(source)

    def _view(self, tensor: torch.Tensor, site: Site) -> torch.Tensor:
        count, length = len(self.lengths), self.lengths[0]
        rows = tensor.narrow(site.token_axis, self.starts[0], count * length)
        if site.batch_axis is None or count == 1:
            return rows
        tokens = site.token_axis - 1
        split = rows.squeeze(site.batch_axis).unflatten(tokens, (count, length))
        return split.movedim(tokens, site.batch_axis)

    def _pairs(
        self, padded: torch.Tensor, packed: torch.Tensor, site: Site
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each prompt's real tokens in the padded and in the packed tensor."""
        longest, axis = max(self.lengths), site.token_axis
        for i, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            row = packed.narrow(axis, start, length)
            if site.batch_axis is None:
                yield padded.narrow(axis, (i + 1) * longest - length, length), row
            else:
                mine = padded.narrow(site.batch_axis, i, 1)
                yield mine.narrow(axis, longest - length, length), row


class PaddedRows:
    """Prompts `first` to `first + len(lengths)` of a left-padded batch `[prompts, longest]`."""

    def __init__(self, first: int, lengths: Sequence[int], prompts: int, longest: int) -> None:
        self.first = first
        self.lengths = lengths
        self._prompts = prompts
        self._longest = longest

    def read(self, tensor: torch.Tensor, site: Site) -> torch.Tensor:
        rows = self._rows(tensor, site)
        if min(self.lengths) < max(self.lengths):
            padded = torch.zeros_like(rows)
            self._copy(rows, padded, site)
            rows = padded
        if site.batch_axis is None:
            return rows.flatten(site.token_axis, site.token_axis + 1)
        return rows

    def write(self, tensor: torch.Tensor, site: Site, value: torch.Tensor) -> None:
        if site.batch_axis is None:
            value = value.unflatten(site.token_axis, (len(self.lengths), max(self.lengths)))
        self._copy(value, self._rows(tensor, site), site)

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


def pack(groups: TokenIds, device: torch.device) -> Batch:
    """Lay all prompts end to end, shortest first, so that equal lengths attend in one call."""
    order = sorted(
        (len(ids), group, invoke, prompt)
        for group, invokes in enumerate(groups)
        for invoke, prompts in enumerate(invokes)
        for prompt, ids in enumerate(prompts)
    )
    starts: dict[tuple[int, int, int], int] = {}
    input_ids: list[int] = []
    position_ids: list[int] = []
    segments = []
    for length, same in groupby(order, key=lambda entry: entry[0]):
        first, count = len(input_ids), 0
        for _, group, invoke, prompt in same:
            starts[group, invoke, prompt] = len(input_ids)
            input_ids += groups[group][invoke][prompt]
            position_ids += range(length)
            count += 1
        segments.append(Segments(first, count, length))
    rows: list[list[Rows]] = [
        [
            PackedRows([starts[g, i, p] for p in range(len(prompts))], list(map(len, prompts)))
            for i, prompts in enumerate(invokes)
        ]
        for g, invokes in enumerate(groups)
    ]
    return Batch(
        input_ids=torch.tensor([input_ids], device=device),
        position_ids=torch.tensor([position_ids], device=device),
        attention_mask=None,
        segments=segments,
        rows=rows,
    )


def pad(groups: TokenIds, device: torch.device) -> Batch:
    """Lay the prompts of all groups out as one left-padded rectangle."""
    prompts = [ids for invokes in groups for invoke in invokes for ids in invoke]
    longest = max(map(len, prompts))
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
    return Batch(
        input_ids=input_ids.to(device),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
        attention_mask=mask.to(device),
        segments=None,
        rows=rows,
    )


def padding_mask(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return `[prompts, longest]` int64: 1 for real tokens, 0 for left padding."""
    longest = max(lengths)
    columns = torch.arange(longest, device=device)
    starts = torch.tensor([longest - n for n in lengths], device=device)
    return (columns >= starts[:, None]).long()
