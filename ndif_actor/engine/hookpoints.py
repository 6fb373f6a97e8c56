"""Which hook points a model has, when each fires, and which of its axes hold the tokens.

Found by running the model without weights on the meta device, at sizes that tell the axes apart,
and noting every tensor that enters or leaves a module, or an operation inside of its forward.
Nothing is assumed from names.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping

import msgspec
import torch
from transformers import PreTrainedModel

from ndif_actor.engine import adapter
from ndif_actor.engine.attention import Attended, AttentionLayout, Segments, attending
from ndif_actor.engine.internals import SQUARE
from ndif_actor.engine.layers import LayerStack, find_layers
from ndif_actor.engine.moments import Moment, Recording, recording_moments
from ndif_actor.errors import ModelError
from ndif_client.wire.graph import HookPoint

#: (batch, sequence, decoder sequence) of the two padded runs, and T of the two packed ones: all
#: different, so that a size names its axis.
_PADDED = ((2, 5, 8), (3, 7, 12))
_PACKED = (11, 13)

_IN_DECODER = frozenset(("decoder_sequence", "batch*decoder_sequence"))

#: The padding of a request whose prompts differ in length; readable, never written.
MASK = HookPoint("", "input", "kwargs.attention_mask")


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one hook point.

    Attributes:
        order: position of its moment in the forward.
        shape: as one user sees it: integers, "batch", "sequence" or "batch*sequence"; in a decoder
            beside an encoder "decoder_sequence" or "batch*decoder_sequence".
        batch_axis: axis of the prompts, None where batch and sequence are one axis.
        token_axis: axis of the tokens (of both, where they are one).
        packed_shape: as it is in a packed row, with "T" for the tokens; None where a packed row
            has no such tensor.
        square: whether it belongs to pairs of tokens: the axis after that of the tokens is one too,
            and what a packed row has are `Squares`.
    """

    point: HookPoint
    order: int
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    batch_axis: int | None
    token_axis: int
    packed_shape: tuple[int | str, ...] | None
    square: bool = False

    @property
    def in_decoder(self) -> bool:
        """Whether its tokens are those that a decoder reads beside an encoder."""
        return not _IN_DECODER.isdisjoint(self.shape)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's share."""
        sizes = (size for size in self.shape if isinstance(size, int))
        return math.prod(sizes) * self.dtype.itemsize

    def shape_for(self, batch: int, sequence: int, keys: int | None = None) -> tuple[int, ...]:
        """Return the shape one user sees.

        Args:
            batch: how many prompts.
            sequence: tokens of the longest, of those it has: see `in_decoder`.
            keys: how many these attend to, where they have a past; else as many as they are.
        """
        sizes = {"batch": batch}
        sizes |= dict.fromkeys(("sequence", "decoder_sequence"), sequence)
        sizes |= dict.fromkeys(("batch*sequence", "batch*decoder_sequence"), batch * sequence)
        shape = [sizes[n] if isinstance(n, str) else n for n in self.shape]
        if self.square and keys is not None:
            shape[self.token_axis + 1] = keys
        return tuple(shape)


class HookTable(msgspec.Struct, frozen=True):
    """All hook points of a model.

    Attributes:
        sites: by hook point, in firing order.
        moments: position of each moment in the forward, of operations only where they have sites.
        attention: paths of the modules that attend.
        layers: the decoder layers, between which a packed row can be laid out anew, or None.
        unpackable: why the model can't run on a packed row, or None.
        withheld: why what was found inside of a forward is no hook point after all.
    """

    sites: dict[HookPoint, Site]
    moments: dict[Moment, int]
    attention: frozenset[str]
    layers: LayerStack | None
    unpackable: str | None
    withheld: dict[HookPoint, str] = {}

    def find(self, point: HookPoint) -> Site:
        """Return the site of `point`.

        Raises:
            LookupError: there is none; the message says what there is instead.
        """
        site = self.sites.get(point)
        if site is None:
            raise LookupError(self._explain(point))
        return site

    def without(self, withheld: Mapping[HookPoint, str]) -> HookTable:
        """Return the same table without some sites; the reasons are told who asks for them."""
        sites = {point: site for point, site in self.sites.items() if point not in withheld}
        reasons = {point: why for point, why in withheld.items() if point in self.sites}
        return msgspec.structs.replace(self, sites=sites, withheld={**self.withheld, **reasons})

    def _explain(self, point: HookPoint) -> str:
        if point in self.withheld:
            return f"{point} can't be touched: {self.withheld[point]}"
        paths = {p.path for p in self.sites}
        if point.path not in paths:
            near = difflib.get_close_matches(point.path, sorted(paths), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"{point}: no module {point.path!r} is called in a forward{hint}"
        operations = {p.operation for p in self.sites if p.path == point.path}
        if point.operation not in operations:
            near = difflib.get_close_matches(point.operation, sorted(operations - {""}), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"{point}: {point.path!r} offers no operation {point.operation!r}{hint}"
        own = (point.path, point.port, point.operation)
        same = [p for p in self.sites if (p.path, p.port, p.operation) == own]
        calls = {p.call for p in same}
        if same and point.call not in calls:
            what = "operation" if point.operation else "module"
            return f"{point}: the {what} is called {len(calls)} time(s) in a forward"
        if point.port not in ("input", "output") and not same:
            return f"{point}: {point.path!r} is no attention whose {point.port} can be seen"
        offered = ", ".join(repr(p.leaf) for p in same if p.call == point.call) or "none"
        return f"{point}: no such tensor; its {point.port} offers the leaves {offered}"


def discover(model: PreTrainedModel) -> HookTable:
    """Find the hook points of a model built without weights.

    Raises:
        ModelError: the model can't run without weights, so its shapes can't be known beforehand.
    """
    try:
        padded = [_record(model, _run_padded, *sizes) for sizes in _PADDED]
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        kind = type(model).__name__
        raise ModelError(f"{kind} can't be traced without weights: {error}") from error
    packed: list[Recording] = []
    try:
        unpackable = adapter.unpackable_reason(model)
        if unpackable is None:
            packed = [_record(model, _run_packed, tokens) for tokens in _PACKED]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        unpackable = f"its forward fails on a packed row: {error}"
    return _table(padded, packed, unpackable, _attention_paths(model))


def _table(
    padded: list[Recording],
    packed: list[Recording],
    unpackable: str | None,
    attention: frozenset[str],
) -> HookTable:
    moments: dict[Moment, int] = {}
    sites: dict[HookPoint, Site] = {}
    for moment in (m for m in padded[0] if m in padded[1]):
        found = _sites(moment, len(moments), padded, packed)
        if found or not moment.operation:
            moments[moment] = len(moments)
            sites |= {site.point: site for site in found}
    layers = find_layers(moments, packed, attention)
    return HookTable(sites, moments, attention, layers, unpackable)


def _sites(
    moment: Moment, order: int, padded: list[Recording], packed: list[Recording]
) -> list[Site]:
    """Return the sites of one moment, which fires at `order`."""
    first, second = (run[moment] for run in padded)
    sites = []
    for leaf, tensor in first.items():
        shape = _symbolic(tensor.shape, second[leaf].shape) if leaf in second else None
        if shape is None:
            continue
        site = _site(moment.point(leaf), order, shape, tensor.dtype, packed)
        if site is None:
            continue
        if packed == [] or site.packed_shape or site.square or site.point == MASK:
            sites.append(site)
    return sites


def _site(
    point: HookPoint,
    order: int,
    shape: tuple[int | str, ...],
    dtype: torch.dtype,
    packed: list[Recording],
) -> Site | None:
    axes = [axis for axis, size in enumerate(shape) if isinstance(size, str)]
    batch_axis: int | None
    square = point.port in SQUARE
    match [shape[axis] for axis in axes]:
        case ["batch", "sequence", "sequence"] if square:
            batch_axis, token_axis = axes[0], axes[1]
        case ["batch", "sequence" | "decoder_sequence"]:
            batch_axis, token_axis = axes
        case ["batch*sequence" | "batch*decoder_sequence"]:
            batch_axis, token_axis = None, axes[0]
        case _:
            return None
    return Site(
        point=point,
        order=order,
        shape=shape,
        dtype=dtype,
        batch_axis=batch_axis,
        token_axis=token_axis,
        packed_shape=_packed_shape(packed, point, token_axis),
        square=square,
    )


def _symbolic(first: torch.Size, second: torch.Size) -> tuple[int | str, ...] | None:
    """Name the axes whose sizes differ between the two padded runs, or None if that fails."""
    (b0, s0, d0), (b1, s1, d1) = _PADDED
    names = {
        (b0, b1): "batch",
        (s0, s1): "sequence",
        (b0 * s0, b1 * s1): "batch*sequence",
        (d0, d1): "decoder_sequence",
        (b0 * d0, b1 * d1): "batch*decoder_sequence",
    }
    if len(first) != len(second):
        return None
    shape: list[int | str] = []
    for pair in zip(first, second, strict=True):
        if pair[0] != pair[1] and pair not in names:
            return None
        shape.append(pair[0] if pair[0] == pair[1] else names[pair])
    return tuple(shape)


def _packed_shape(
    packed: list[Recording], point: HookPoint, token_axis: int
) -> tuple[int | str, ...] | None:
    moment, leaf = Moment.of(point), point.leaf
    found = [run[moment][leaf].shape for run in packed if leaf in run.get(moment, {})]
    if len(found) != len(_PACKED) or len(found[0]) != len(found[1]):
        return None
    varying = [axis for axis, sizes in enumerate(zip(*found, strict=True)) if len(set(sizes)) > 1]
    if varying != [token_axis] or found[0][token_axis] != _PACKED[0]:
        return None
    return tuple("T" if axis == token_axis else size for axis, size in enumerate(found[0]))


# ---------------------------------------------------------------- running and recording


def _record(model: PreTrainedModel, run: Callable[..., object], *sizes: int) -> Recording:
    recording: Recording = {}
    with recording_moments(model, recording), torch.no_grad():
        run(model, *sizes)
    return recording


def run(model: PreTrainedModel, tokens: int, *, packed: bool) -> None:
    """Run a model without weights on one prompt of so many tokens."""
    if packed:
        _run_packed(model, tokens)
    else:
        _run_padded(model, 1, tokens, tokens)


def _run_padded(
    model: PreTrainedModel, batch: int, sequence: int, decoder_sequence: int
) -> list[Attended]:
    """Return which modules have attended."""
    ids = torch.zeros(batch, sequence, dtype=torch.long, device="meta")
    decoder = None
    if adapter.has_encoder_and_decoder(model):
        own = torch.zeros(batch, decoder_sequence, dtype=torch.long, device="meta")
        decoder = own, own.clone()
    with attending(None) as record:
        adapter.run_padded(model, ids, ids.clone(), ids.clone(), decoder)
    return record.attended


def _run_packed(model: PreTrainedModel, tokens: int) -> None:
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with attending(AttentionLayout([Segments(0, 1, tokens)])):
        adapter.run_packed(model, ids, ids.clone())


def _attention_paths(model: PreTrainedModel) -> frozenset[str]:
    with torch.no_grad():
        attended = {id(one.module) for one in _run_padded(model, 1, 2, 2)}
    return frozenset(path for path, module in model.named_modules() if id(module) in attended)
