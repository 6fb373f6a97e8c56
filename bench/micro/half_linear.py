"""A bfloat16 Linear on this processor: torch's own product beside one widened to float32.

Says whether `ndif_actor/engine/linear.py` pays here, at the shapes of a small model and at the
row counts that packing gives.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.measure import Figure, alternate, ratios, spread
from bench.record import Recorder

if TYPE_CHECKING:
    import torch

#: (in_features, out_features): query, key, gate and down projections, and head, of SmolLM2-135M.
_SHAPES = ((576, 576), (576, 192), (576, 1536), (1536, 576), (576, 49152))

#: Time that one subject may take in one round, in seconds.
_SLICE_S = 0.02


def main(
    rows: Annotated[str, typer.Option(help="Row counts, with commas.")] = "1,8,32,128,288,1024",
    rounds: Annotated[int, typer.Option(help="Alternations kept.")] = 7,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Measure torch's bfloat16 Linear beside the widened one, per shape and row count."""
    from ndif_actor.engine.cpu import has_native_half, kernel_environment

    os.environ.update(kernel_environment("bfloat16"))
    counts = [int(count) for count in rows.split(",")]
    native = has_native_half()
    recorder = Recorder("half_linear", {"rows": counts, "rounds": rounds, "native_half": native})
    figures, observations = [], {}
    for in_features, out_features in _SHAPES:
        for count in counts:
            name = f"{in_features}x{out_features}, {count} rows"
            observed = _compare(in_features, out_features, count, rounds)
            observations[name] = observed
            gain = spread(ratios(observed["torch"], observed["widened"]))
            meaning = "time of torch's own / of the widened product"
            figures.append(Figure(name=name, meaning=meaning, unit="x", spread=gain))
    recorder.finish(figures, observations, out)


def _compare(in_features: int, out_features: int, rows: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of one product, per subject and round."""
    import torch

    from ndif_actor.engine.linear import widen_linears

    def linear() -> torch.nn.Module:
        return torch.nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16)

    own, widened = linear(), linear()
    widen_linears(widened)
    given = torch.randn(rows, in_features, dtype=torch.bfloat16)
    with torch.inference_mode():
        return alternate(
            {
                "torch": lambda _: _seconds(lambda: own(given)),
                "widened": lambda _: _seconds(lambda: widened(given)),
            },
            rounds,
        )


def _seconds(product: Callable[[], torch.Tensor]) -> float:
    """Return the mean time of a call, over as many as fit a slice of time, at least one."""
    began, calls = time.perf_counter(), 0
    while True:
        product()
        calls += 1
        elapsed = time.perf_counter() - began
        if elapsed > _SLICE_S:
            return elapsed / calls


if __name__ == "__main__":
    typer.run(main)
