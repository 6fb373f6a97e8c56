"""What a graph costs before it runs, against its size: bytes, encoding, and every check.

A graph reads hook points spread over the model and does arithmetic with what it reads. It is
encoded as the client does, then decoded, screened, compiled (put in the order of the forward) and
checked with all shapes and the price, as admission does in its own thread while forwards run. The
model is built without its weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from bench.graphs import arithmetic
from bench.measure import Figure, alternate, scaled, spread
from bench.record import Recorder

#: Nodes of a graph.
SIZES = (10, 100, 1000, 10_000)

#: Nodes that are worked through in one measurement, to fill some time.
_WORK = 10_000

_STAGES = {
    "encode": "the client's msgpack of a submission",
    "decode": "the server's decoding and validating of it",
    "screen": "limits and references",
    "compile": "the order of nodes along the forward",
    "check": "that, all shapes on the meta device, and the price",
    "check again": "the same for an equal graph, if it is not too long to be remembered",
}


def main(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, or `demo`.")] = "demo",
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 24,
    rounds: Annotated[int, typer.Option(help="Rounds kept.")] = 7,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Measure encoding, decoding, screening, compiling and checking graphs of several sizes."""
    from ndif_actor.engine.blueprint import Blueprint
    from ndif_actor.engine.checkpoint import resolve

    recorder = Recorder("graph_cost", {"model": model, "tokens": tokens, "rounds": rounds})
    blueprint = Blueprint.load(resolve(model), "float32", 1)
    figures, observations = measure(blueprint, tokens, rounds)
    recorder.finish(figures, observations, out)


def measure(
    blueprint: Any, tokens: int, rounds: int, sizes: tuple[int, ...] = SIZES
) -> tuple[list[Figure], dict[str, Any]]:
    """Time every stage of graphs of these sizes; return figures, and seconds of one graph."""
    points = [site.point for site in blueprint.table.sites.values() if _is_ordinary(site)]
    figures: list[Figure] = []
    observations: dict[str, Any] = {}
    for size in sizes:
        stages, num_bytes = _stages(blueprint, points, size, tokens)
        repeats = max(1, _WORK // size)
        seconds = alternate(
            {name: partial(_timed, stage, repeats) for name, stage in stages.items()},
            rounds,
        )
        observations[f"{size} nodes"] = {"bytes": num_bytes, **seconds}
        figures += [
            Figure(
                name=f"{name}, {size} nodes",
                meaning=f"{_STAGES[name]}, per graph",
                unit="ms",
                spread=spread(scaled(taken, 1e3)),
            )
            for name, taken in seconds.items()
        ]
    return figures, observations


def _is_ordinary(site: Any) -> bool:
    is_whole = site.batch_axis is not None and site.dtype.is_floating_point
    return is_whole and bool(site.point.path) and not site.point.operation


def _stages(
    blueprint: Any, points: list[Any], size: int, tokens: int
) -> tuple[dict[str, Callable[[], object]], int]:
    """Return what is done with a graph of this size, stage by stage, and its bytes."""
    from ndif_actor.coordinator.screening import screen
    from ndif_client.wire.graph import Invoke
    from ndif_client.wire.messages import Submission, TraceRequest

    graph = arithmetic(points, size)
    request = TraceRequest(id="measured", model="", invokes=[Invoke([[1] * tokens])], graph=graph)
    submission = Submission(requests=[request])
    encoder = msgspec.msgpack.Encoder()
    decoder = msgspec.msgpack.Decoder(Submission)
    encoded = encoder.encode(submission)

    def forgotten(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            blueprint.forget_graphs()
            return work()

        return run

    def check() -> object:
        return blueprint.check(graph, [[tokens]], [])

    stages: dict[str, Callable[[], object]] = {
        "encode": lambda: encoder.encode(submission),
        "decode": lambda: decoder.decode(encoded),
        "screen": lambda: screen(graph),
        "compile": forgotten(lambda: blueprint.compile(graph, 1, 1)),
        "check": forgotten(check),
        "check again": check,
    }
    return stages, len(encoded)


def _timed(stage: Callable[[], object], repeats: int, round_number: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        stage()
    return (time.perf_counter() - began) / repeats


if __name__ == "__main__":
    typer.run(main)
