"""What autograd keeps of a forward until its backward, found out without weights.

Three forwards on the meta device, of different lengths, show which tensors autograd saves and
where: how much grows with the length, and how much with its square, as masks and written-out
patterns do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ndif_actor.engine import adapter, hookpoints
from ndif_actor.engine.flows import differentiable
from ndif_actor.engine.moments import Moment
from ndif_client.wire.graph import Port

#: Tokens of the three forwards, beyond those that fit into a sliding window.
_LENGTHS = (64, 128, 192)


class Kept(NamedTuple):
    """Bytes for each token, and for each pair of tokens of a prompt."""

    token: float
    pair: float


class Retention(msgspec.Struct, frozen=True):
    """What is kept, by the order of the last moment before the operation that keeps it."""

    kept_at: dict[int, Kept]

    def between(self, first: int, last: int, lengths: Iterable[int]) -> int:
        """Return how many bytes prompts keep of the forward from one moment to another.

        Args:
            first, last: the orders of these moments.
            lengths: tokens of each prompt.
        """
        own = [kept for order, kept in self.kept_at.items() if first <= order <= last]
        token, pair = (sum(kept[axis] for kept in own) for axis in (0, 1))
        return math.ceil(sum(length * token + length**2 * pair for length in lengths))


def measure(model: PreTrainedModel, table: hookpoints.HookTable) -> Retention:
    """Return what a model without weights keeps of its forward.

    Raises:
        RuntimeError: its forward can't be differentiated.
    """
    window = adapter.sliding_window(model.config) or 0
    lengths = [window + length for length in _LENGTHS]
    runs = [_kept(model, table, tokens) for tokens in lengths]
    return Retention({order: _growth(lengths, [run[order] for run in runs]) for order in runs[-1]})


def _growth(lengths: Sequence[int], kept: Sequence[int]) -> Kept:
    """Return the linear and the quadratic part of what was kept at each of three lengths."""
    slopes = [
        (more - less) / (long - short)
        for (less, more), (short, long) in zip(pairwise(kept), pairwise(lengths), strict=True)
    ]
    pair = max(0.0, (slopes[1] - slopes[0]) / (lengths[2] - lengths[0]))
    return Kept(max(0.0, slopes[0] - pair * (lengths[0] + lengths[1])), pair)


def _kept(model: PreTrainedModel, table: hookpoints.HookTable, tokens: int) -> Counter[int]:
    """Return the bytes that autograd saves in one forward, by where it does."""
    kept: Counter[int] = Counter()
    clock = _Clock(table.moments)
    weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    # They stay alive, so that none is mistaken for another one.
    counted: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in counted:
            counted[storage._cdata] = storage
            kept[clock.now] += storage.nbytes()
        return tensor

    with ExitStack() as stack:
        embedding = model.get_input_embeddings()
        stack.callback(embedding.register_forward_hook(differentiable).remove)
        for path, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(clock.listener(path, "input")).remove)
            stack.callback(module.register_forward_hook(clock.listener(path, "output")).remove)
        stack.enter_context(saved_tensors_hooks(save, lambda tensor: tensor))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_FusedKernels())
        hookpoints.run(model, tokens, packed=table.unpackable is None)
    return kept


class _FusedKernels(TorchFunctionMode):
    """Attend as fused kernels do; on the meta device torch itself would save all patterns."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3], (kwargs or {}).get("attn_mask"))
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """Saves what flash attention does (Dao et al. 2022): no patterns, but the sums of each row.

    A mask is saved in the dtype of the queries.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        bias = out.new_empty(0 if mask is None else mask.shape)
        ctx.save_for_backward(query, key, value, out, out.new_empty(query.shape[:-1]), bias)
        return out


class _Clock:
    """Knows how far a forward is, by the moments of its modules."""

    def __init__(self, moments: Mapping[Moment, int]) -> None:
        self.now = 0
        self._moments = moments
        self._calls: Counter[tuple[str, Port]] = Counter()

    def listener(self, path: str, port: Port) -> Any:
        """Return the hook of one port of a module."""

        def listen(*_: Any) -> None:
            moment = Moment(path, port, self._calls[path, port])
            self._calls[path, port] += 1
            self.now = self._moments.get(moment, self.now)

        return listen
