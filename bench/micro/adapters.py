"""What adapters of many users cost in a shared forward, each user with one of its own.

A forward whose requests all have a low-rank adapter on the queries and values of every layer takes
turns with the same forward without: computed as one product a module for all users, one by one, and
written out as operations of the graph. The engine runs in a process of its own, without a server.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bench.measure import Figure, alternate, differences, scaled, spread
from bench.packed import PackedModel
from bench.prompts import draw
from bench.record import Recorder
from bench.worker import Worker

#: Linear modules that are adapted, in every layer.
_MODULES = ["q_proj", "v_proj"]

_WAYS = ("as one", "one by one", "by hand")


def main(
    model: Annotated[str, typer.Option(help="A local folder, a hub id, or `demo`.")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, ...")] = "bfloat16",
    users: Annotated[list[int] | None, typer.Option(help="Requests in the forward.")] = None,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 8,
    rounds: Annotated[int, typer.Option(help="Alternations kept.")] = 15,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Measure forwards whose requests all have adapters, and the same without."""
    from ndif_actor.engine.checkpoint import resolve

    counts = users or [8, 32]
    settings = {"model": model, "dtype": dtype, "users": counts, "rank": rank, "modules": _MODULES}
    recorder = Recorder("adapters", settings)
    with Worker(PackedModel, str(resolve(model)), dtype) as engine:
        requests = draw(0, max(counts), 1)

        def side(count: int, how: str) -> Callable[[int], float]:
            return lambda _: float(engine.call("adapted", requests[:count], _MODULES, rank, how))

        sides = [(count, how) for count in counts for how in ("none", *_WAYS)]
        seen = alternate(
            {f"{count} users, {how}": side(count, how) for count, how in sides}, rounds, warmups=2
        )
    figures = [_figure(count, how, seen) for count in counts for how in _WAYS]
    recorder.finish(figures, dict(seen), out)


def _figure(count: int, how: str, seen: dict[str, list[float]]) -> Figure:
    longer = differences(seen[f"{count} users, {how}"], seen[f"{count} users, none"])
    return Figure(
        name=f"{count} users, {how}",
        meaning="time that the forward takes longer with adapters",
        unit="ms",
        spread=spread(scaled(longer, 1e3)),
    )


if __name__ == "__main__":
    typer.run(main)
