"""What it saves that rows leave the batch early and fork late, in the engine alone.

The same requests are run by the same code with every row in the batch through all layers. Without
early leave a forward still may end after the last layer that anybody needs; that is measured too,
and is what early leave gains by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bench.measure import Figure, alternate, ratios, spread
from bench.prompts import LENGTHS, draw
from bench.ragged import SWEEP_TOKENS, RaggedModel
from bench.record import Recorder
from bench.worker import Worker

_TARGET_LEAVE, _TARGET_FORK = 1.7, 0.6

#: Steering strengths in a sweep.
_STRENGTHS = 30

#: Largest relative distance between values saved with and without, for rounding.
_TOLERANCE = 0.05


def main(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, or `demo`.")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, ...")] = "bfloat16",
    users: Annotated[int, typer.Option(help="Requests of the load-test batch.")] = 32,
    rounds: Annotated[int, typer.Option(help="Alternations kept.")] = 9,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Measure early leave and late fork against the same forwards without them."""
    from ndif_actor.engine.checkpoint import resolve

    folder = str(resolve(model))
    settings = {"model": model, "dtype": dtype, "users": users, "tokens": LENGTHS}
    recorder = Recorder("ragged_depth", {**settings, "sweep_tokens": SWEEP_TOKENS})
    with Worker(RaggedModel, folder, dtype) as engine:
        _check(engine, users)
        left, leaving = _leave(engine, users, rounds)
        forked, forking = _fork(engine, rounds)
    recorder.finish(left + forked, leaving | forking, out)


def _check(engine: Worker, users: int) -> None:
    """Make sure that rows which leave or are shared give the values of those that don't."""
    apart = engine.call("apart", draw(0, users, engine.call("num_layers")))
    if not apart <= _TOLERANCE:
        raise SystemExit(f"values with and without differ by {apart:.1%}")


def _leave(engine: Worker, users: int, rounds: int) -> tuple[list[Figure], dict[str, list[float]]]:
    """Compare a batch whose rows leave with the same batch whose rows stay."""
    layers = engine.call("num_layers")

    def run(how: str) -> Callable[[int], float]:
        return lambda number: float(engine.call("load_test", draw(number, users, layers), how))

    seen = alternate({how: run(how) for how in ("leaving", "staying", "whole")}, rounds, warmups=2)
    gain = spread(ratios(seen["whole"], seen["leaving"]))
    figures = [
        Figure(
            name=f"early leave, {users} users, random layers",
            meaning="time of the whole forward with all rows in it / with rows leaving",
            unit="x",
            spread=gain,
            target=f">= {_TARGET_LEAVE:g} x",
            met=gain.median >= _TARGET_LEAVE,
        ),
        Figure(
            name="of which rows leaving",
            meaning="time of a forward that ends where nobody needs more / with rows leaving too",
            unit="x",
            spread=spread(ratios(seen["staying"], seen["leaving"])),
        ),
    ]
    return figures, {f"load test, {how}": seconds for how, seconds in seen.items()}


def _fork(engine: Worker, rounds: int) -> tuple[list[Figure], dict[str, list[float]]]:
    """Compare sweeps whose members share rows with sweeps whose members have rows of their own."""
    layers = engine.call("num_layers")

    def run(method: str, *arguments: object, **how: bool) -> Callable[[int], float]:
        return lambda number: float(
            engine.call(method, draw(number, 1, layers)[0], *arguments, **how)
        )

    sweeps = {
        f"patching at {layers} layers": (
            run("patching", ragged=True),
            run("patching", ragged=False),
            "time of the trace / with rows of their own, all of them through the whole model",
        ),
        f"ablating {layers} MLPs": (
            run("ablating", shared=True),
            run("ablating", shared=False),
            "time of the forward / with rows of their own, the logits only where they are read",
        ),
        f"steering with {_STRENGTHS} strengths": (
            run("steering", _STRENGTHS, shared=True),
            run("steering", _STRENGTHS, shared=False),
            "time of the forward / with rows of their own, the logits only where they are read",
        ),
    }
    figures: list[Figure] = []
    observations: dict[str, list[float]] = {}
    for number, (name, (shared, separate, meaning)) in enumerate(sweeps.items()):
        seen = alternate({"shared": shared, "separate": separate}, rounds, warmups=2)
        share = spread(ratios(seen["shared"], seen["separate"]))
        judged = number == 0
        figures.append(
            Figure(
                name=name,
                meaning=meaning,
                unit="x",
                spread=share,
                target=f"<= {_TARGET_FORK:g} x" if judged else None,
                met=share.median <= _TARGET_FORK if judged else None,
            )
        )
        observations |= {f"{name}: {how}": seconds for how, seconds in seen.items()}
    return figures, observations


if __name__ == "__main__":
    typer.run(main)
