"""Low-rank updates: what the adapters of several groups add at one moment, in few products.

Every group has factors of its own, so no product serves two of them. But those of one shape are
one batched product, and a hundred users with adapters cost two products a module, not two hundred.
torch's grouped product (`torch.nn.functional.grouped_mm`) is of no use here: in float32, which
adapters are computed in, it is a loop that waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

#: Updates of at most so many rows are padded to the next power of two; larger ones join only
#: others of their own size, for there the product itself takes the time.
_MOST_PADDED = 64

_Kind = tuple[int, torch.Size, torch.Size, torch.dtype]


class LowRank:
    """One group's `input + scaling * x @ a.mT @ b.mT`, asked for and answered.

    The sum is computed in the widest of the dtypes given, in float32 at least, and has the
    dtype of `input`: an adapter works on a model of half precision as PEFT lets it.

    Args:
        input: `[..., out]`.
        x: `[..., in]`.
        a: `[rank, in]`.
        b: `[out, rank]`.
        scaling: a number.

    Raises:
        TypeError, ValueError: they do not fit each other.
    """

    def __init__(
        self,
        input: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float = 1.0,
    ) -> None:
        _check(input, x, a, b)
        self.input, self.x, self.a, self.b, self.scaling = input, x, a, b, scaling
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.dtype = torch.promote_types(dtype, torch.promote_types(a.dtype, b.dtype))
        self._result: torch.Tensor | None = None

    def kind(self) -> _Kind:
        """Return what must be equal for updates to be computed as one."""
        rows = self.x.shape[:-1].numel()
        return _padded(rows), self.a.shape, self.b.shape, self.dtype

    def add(self, update: torch.Tensor) -> None:
        """Be given `x @ a.mT @ b.mT`."""
        shaped = update.reshape(*self.x.shape[:-1], update.shape[-1])
        self._result = torch.add(self.input, shaped, alpha=self.scaling).to(self.input.dtype)

    def result(self) -> torch.Tensor:
        """Return the sum; it is computed now, if nobody has done so."""
        if self._result is None:
            down = self.x.to(self.dtype) @ self.a.to(self.dtype).mT
            self.add(down @ self.b.to(self.dtype).mT)
        assert self._result is not None
        return self._result


def low_rank(
    input: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float = 1.0,
) -> torch.Tensor:
    """Return one update by itself; see `LowRank`.

    Raises:
        TypeError, ValueError: the arguments do not fit each other.
    """
    return LowRank(input, x, a, b, scaling).result()


def compute_together(asked: Sequence[LowRank]) -> None:
    """Compute the updates that can be computed as one; the others wait until they are looked at."""
    kinds: dict[_Kind, list[LowRank]] = {}
    for one in asked:
        kinds.setdefault(one.kind(), []).append(one)
    for (_, _, _, dtype), alike in kinds.items():
        if len(alike) > 1:
            _compute(alike, dtype)


def _compute(alike: Sequence[LowRank], dtype: torch.dtype) -> None:
    rows = [one.x.reshape(-1, one.x.shape[-1]).to(dtype) for one in alike]
    a = torch.stack([one.a.to(dtype) for one in alike])
    b = torch.stack([one.b.to(dtype) for one in alike])
    equal = all(len(own) == len(rows[0]) for own in rows)
    x = torch.stack(rows) if equal else pad_sequence(rows, batch_first=True)
    updates = torch.bmm(torch.bmm(x, a.mT), b.mT)
    for one, own, update in zip(alike, rows, updates.unbind(), strict=True):
        one.add(update[: len(own)])


def _padded(rows: int) -> int:
    return rows if rows > _MOST_PADDED else 1 << (rows - 1).bit_length() if rows else 0


def _check(input: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Refuse what does not fit, before others are computed along with it."""
    for name, value in (("input", input), ("x", x), ("a", a), ("b", b)):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a tensor of floats")
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"a must be [rank, in] and b [out, rank], not {list(a.shape)} and {list(b.shape)}"
        )
    if not x.dim() or x.shape[-1] != a.shape[1]:
        raise ValueError(f"x must be [..., {a.shape[1]}], as a has it, not {list(x.shape)}")
    wanted = [*x.shape[:-1], b.shape[0]]
    if list(input.shape) != wanted:
        raise ValueError(f"input must be {wanted}, as x and b have it, not {list(input.shape)}")
