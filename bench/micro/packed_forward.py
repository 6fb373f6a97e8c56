"""One packed forward of the engine beside as many bare forwards.

The upper bound of `bench.load.shared_forward`: no server, client or wire. Both sides run in
processes of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.measure import Figure, alternate, ratios, spread
from bench.packed import PackedModel
from bench.prompts import draw
from bench.record import Recorder
from bench.reference import BareModel
from bench.worker import Worker


def main(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, or `demo`.")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, ...")] = "bfloat16",
    users: Annotated[int, typer.Option(help="Requests in the shared forward.")] = 32,
    rounds: Annotated[int, typer.Option(help="Alternations kept.")] = 7,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Measure the engine alone: one packed forward beside bare ones."""
    from ndif_actor.engine.checkpoint import resolve

    folder = str(resolve(model))
    settings = {"model": model, "dtype": dtype, "users": users, "rounds": rounds}
    recorder = Recorder("packed_forward", settings)
    with Worker(BareModel, folder, dtype) as bare, Worker(PackedModel, folder, dtype) as engine:
        figures, observations = _sharing(bare, engine, users, rounds)
    recorder.finish(figures, observations, out)


def _sharing(
    bare: Worker, engine: Worker, users: int, rounds: int
) -> tuple[list[Figure], dict[str, list[float]]]:
    """Compare one packed forward with the same requests one after another."""
    layers = bare.call("num_layers")

    def one_after_another(number: int, count: int, logits: bool) -> float:
        return float(sum(bare.call("one_after_another", draw(number, count, layers), logits)))

    def together(number: int, count: int, logits: bool) -> float:
        return float(engine.call("together", draw(number, count, layers), logits))

    figures: list[Figure] = []
    observations: dict[str, list[float]] = {}
    for count in (users, 1):
        for logits in (False, True):
            name = f"{count} saving a layer" + (" and logits" if logits else "")
            seen = alternate(
                {
                    "bare": lambda n, c=count, s=logits: one_after_another(n, c, s),  # type: ignore[misc]
                    "packed": lambda n, c=count, s=logits: together(n, c, s),  # type: ignore[misc]
                },
                rounds if count > 1 else 4 * rounds,
                warmups=2,
            )
            meaning = "time of bare forwards one after another / of one packed forward"
            gain = spread(ratios(seen["bare"], seen["packed"]))
            figures.append(Figure(name=name, meaning=meaning, unit="x", spread=gain))
            observations |= {f"{name}: {side}": seconds for side, seconds in seen.items()}
    return figures, observations


if __name__ == "__main__":
    typer.run(main)
