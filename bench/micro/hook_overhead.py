"""What a touched hook point costs, beside one of PyTorch's own hooks.

The cost of a hook point is the time that a forward takes longer when its requests touch many of
them, inputs and outputs of modules spread over the model, per point and request. Reading one does
nothing with the value; saving one takes a number out of it. Both sides run in processes of their
own, the engine without a server.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.measure import Figure, alternate, differences, scaled, spread
from bench.packed import PackedModel
from bench.prompts import draw
from bench.record import Recorder
from bench.reference import BareModel
from bench.worker import Worker

#: Hook points per request.
_POINTS = 200

_KINDS = ("none", "read", "saved")


def main(
    model: Annotated[str, typer.Option(help="A local folder, a hub id, or `demo`.")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, ...")] = "bfloat16",
    users: Annotated[int, typer.Option(help="Requests in the shared forward.")] = 32,
    rounds: Annotated[int, typer.Option(help="Alternations kept.")] = 21,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Measure forwards whose requests touch many hook points, and none."""
    from ndif_actor.engine.checkpoint import resolve

    folder = str(resolve(model))
    settings = {"model": model, "dtype": dtype, "users": users, "points": _POINTS}
    recorder = Recorder("hook_overhead", settings)
    with Worker(BareModel, folder, dtype) as bare, Worker(PackedModel, folder, dtype) as engine:
        requests = draw(0, users, bare.call("num_layers"))
        places = engine.call("places", _POINTS)

        def alone(kind: str) -> float:
            return float(bare.call("touching", requests[0], _touched(places, kind), kind))

        def packed(kind: str, count: int) -> float:
            touched = _touched(places, kind)
            return float(engine.call("touching", requests[:count], touched, kind == "saved"))

        seen = alternate(
            {f"plain hook, {kind}": lambda _, k=kind: alone(k) for kind in _KINDS}
            | {f"1 request, {kind}": lambda _, k=kind: packed(k, 1) for kind in _KINDS}
            | {f"{users} requests, {kind}": lambda _, k=kind: packed(k, users) for kind in _KINDS},
            rounds,
            warmups=2,
        )
    figures = [
        figure
        for who, count in (("plain hook", 1), ("1 request", 1), (f"{users} requests", users))
        for figure in _figures(who, count, seen)
    ]
    recorder.finish(figures, dict(seen), out)


def _touched(places: list[tuple[str, str]], kind: str) -> list[tuple[str, str]]:
    return [] if kind == "none" else places


def _figures(who: str, count: int, seen: dict[str, list[float]]) -> list[Figure]:
    none = seen[f"{who}, none"]
    return [
        Figure(
            name=f"{who}, {kind}",
            meaning=f"time longer with {_POINTS} points per request, per point and request",
            unit="us",
            spread=spread(scaled(differences(seen[f"{who}, {kind}"], none), 1e6 / _POINTS / count)),
        )
        for kind in ("read", "saved")
    ]


if __name__ == "__main__":
    typer.run(main)
