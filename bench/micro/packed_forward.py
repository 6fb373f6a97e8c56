"""One packed forward of the engine beside as many bare forwards; and what a hook point costs.

The upper bound of `bench.load.shared_forward`: no server, client or wire. Both sides run in
processes of their own. The cost of a hook point is the time that a forward takes longer when its
requests read many of them, per point and request.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.measure import Figure, alternate, differences, ratios, scaled, spread
from bench.packed import PackedModel
from bench.prompts import draw
from bench.record import Recorder
from bench.reference import BareModel
from bench.worker import Worker

#: Hook points read per request to see what one costs.
_POINTS = 200


def main(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, or `demo`.")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, ...")] = "bfloat16",
    users: Annotated[int, typer.Option(help="Requests in the shared forward.")] = 32,
    rounds: Annotated[int, typer.Option(help="Alternations kept.")] = 7,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Measure the engine alone: one packed forward beside bare ones, and the cost of hooks."""
    from ndif_actor.engine.checkpoint import resolve

    folder = str(resolve(model))
    settings = {"model": model, "dtype": dtype, "users": users, "rounds": rounds}
    recorder = Recorder("packed_forward", {**settings, "points": _POINTS})
    with Worker(BareModel, folder, dtype) as bare, Worker(PackedModel, folder, dtype) as engine:
        shared, sharing = _sharing(bare, engine, users, rounds)
        alone, hooks = _hook_points(engine, bare.call("num_layers"), users, rounds)
    recorder.finish(shared + alone, sharing | hooks, out)


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


def _hook_points(
    engine: Worker, layers: int, users: int, rounds: int
) -> tuple[list[Figure], dict[str, list[float]]]:
    """Compare whole forwards whose requests read many hook points and hardly any."""
    figures: list[Figure] = []
    observations: dict[str, list[float]] = {}
    for count in (1, users):
        requests = draw(0, count, layers)
        seen = alternate(
            {
                "none": lambda _, r=requests: engine.call("touching", r, 0, False),  # type: ignore[misc]
                "read": lambda _, r=requests: engine.call("touching", r, _POINTS, False),  # type: ignore[misc]
                "saved": lambda _, r=requests: engine.call("touching", r, _POINTS, True),  # type: ignore[misc]
            },
            rounds,
        )
        for kind in ("read", "saved"):
            each = scaled(differences(seen[kind], seen["none"]), 1e6 / _POINTS / count)
            meaning = f"time longer with {_POINTS} points per request, per point and request"
            name = f"hook point {kind}, {count} in the forward"
            figures.append(Figure(name=name, meaning=meaning, unit="us", spread=spread(each)))
        observations |= {f"hook points {kind}, {count}": seconds for kind, seconds in seen.items()}
    return figures, observations


if __name__ == "__main__":
    typer.run(main)
