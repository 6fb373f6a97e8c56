"""What a request would cost, in words."""

from __future__ import annotations

from itertools import pairwise

import msgspec

from ndif_client.wire import messages


class Explanation(messages.Explanation, frozen=True, kw_only=True):
    """What a trace or generation would cost, alone, without running it; `print` it to read it.

    Attributes are those of the wire's: `tokens`, `value_bytes`, `saved_bytes`, `flops`, `depth`,
    `row_layers`, `notes`.
    """

    def __str__(self) -> str:
        computed, most = self.row_layers
        lines = [
            f"{self.id[:8]}: {_count(self.tokens, 'token')}, values {_bytes(self.value_bytes)}, "
            f"result {_bytes(self.saved_bytes)}, {_short(self.flops)}FLOP of its own",
            f"  rows per layer: {self._rows()}",
        ]
        if most:
            lines.append(f"  computes {computed} of {most} rows x layers")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def _rows(self) -> str:
        """Return how many rows go through which layers, such as "12 (layers 0-3), 1 (after)"."""
        parts = []
        for this, following in pairwise(self.depth):
            last = following.before - 1
            layers = f"layer {last}" if last == this.before else f"layers {this.before}-{last}"
            parts.append(f"{this.rows} ({layers})")
        parts += [f"{part.rows} (from {part.before} on)" for part in self.depth[-1:]]
        return ", ".join(parts) or "none"


class Explanations(msgspec.Struct, frozen=True):
    """The wire's reply, its entries readable."""

    requests: list[Explanation]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _bytes(number: int) -> str:
    return f"{_short(number)}B"


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} P"
