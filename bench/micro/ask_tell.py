"""Asking an actor and telling it things, beside an actor of Ray on the same machine.

Arrays of three sizes go to an actor in another process, which reads one byte of each page and
answers (there), come from one (back), or are sent one after another without waiting (tell). Both
sides start from an ordinary array, so what it takes to bring it into shared memory counts.

    python -m bench.peers install nnsight    # the environment that has Ray
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.links import Echo, Pair
from bench.measure import Figure, alternate, ratios, scaled, spread
from bench.peers import environments
from bench.peers.process import PeerProcess
from bench.record import Recorder
from bench.worker import Worker

#: Bytes, and calls that make one measurement of them.
SIZES = {"1 KB": (1 << 10, 500), "1 MB": (1 << 20, 50), "64 MB": (64 << 20, 3)}

_MEANINGS = {
    "there": "an array goes to the actor, which reads it and answers",
    "back": "the actor is asked for an array, which is read",
    "tell": "arrays are sent without waiting; when the last was read, per array",
}

#: How much faster than Ray's a call is meant to be.
_TARGETS = {("there", "1 KB"): 15.0, ("there", "64 MB"): 1.0, ("back", "64 MB"): 1.0}

_ENVIRONMENT = "nnsight"


def main(
    rounds: Annotated[int, typer.Option(help="Alternations kept.")] = 9,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Measure calls between two processes of this machine."""
    python = environments.python_of(_ENVIRONMENT)
    if python is None:
        raise SystemExit(f"Ray is not there: python -m bench.peers install {_ENVIRONMENT}")
    recorder = Recorder("ask_tell", {"rounds": rounds})
    ray = PeerProcess(python, "ray_actor", "", "")
    with Worker(Pair) as ours, Worker(Echo) as echo:
        bare, bare_observations = _beside_a_bare_echo(ours, echo, rounds)
        figures, observations = compare(ours, ray, rounds)
        ours.call("close")
        echo.call("close")
    ray.close()
    seen = {**observations, **bare_observations, "versions": ray.versions}
    recorder.finish(figures + bare, seen, out)


def _beside_a_bare_echo(
    ours: Worker, echo: Worker, rounds: int
) -> tuple[list[Figure], dict[str, dict[str, list[float]]]]:
    """Compare asking with bytes sent back by uvloop alone: most of either is waking a process."""
    num_bytes, calls = SIZES["1 KB"]
    seconds = alternate(
        {
            "ours": lambda _: float(ours.call("there", num_bytes, calls)),
            "echo": lambda _: float(echo.call("there", num_bytes, calls)),
        },
        rounds,
        warmups=2,
    )
    figure = Figure(
        name="there, 1 KB, beside a bare echo",
        meaning="time with ours / of the same bytes sent there and back by uvloop alone",
        unit="x",
        spread=spread(ratios(seconds["ours"], seconds["echo"])),
    )
    return [figure], {"there, 1 KB, and a bare echo": seconds}


def compare(
    ours: Worker, ray: PeerProcess, rounds: int
) -> tuple[list[Figure], dict[str, dict[str, list[float]]]]:
    """Measure every size in every way, alternately; return figures, and seconds of one call."""
    figures: list[Figure] = []
    observations: dict[str, dict[str, list[float]]] = {}
    for way, meaning in _MEANINGS.items():
        for size, (num_bytes, calls) in SIZES.items():

            def ask_ours(_: int, way: str = way, n: int = num_bytes, calls: int = calls) -> float:
                return float(ours.call(way, n, calls))

            def ask_ray(_: int, way: str = way, n: int = num_bytes, calls: int = calls) -> float:
                request = {"way": way, "num_bytes": n, "calls": calls}
                return ray.run([request]).seconds[0] / calls

            seconds = alternate({"ours": ask_ours, "ray": ask_ray}, rounds, warmups=2)
            observations[f"{way}, {size}"] = seconds
            figures += _figures(way, size, meaning, seconds)
    return figures, observations


def _figures(way: str, size: str, meaning: str, seconds: dict[str, list[float]]) -> list[Figure]:
    faster = spread(ratios(seconds["ray"], seconds["ours"]))
    least = _TARGETS.get((way, size))
    return [
        Figure(
            name=f"{way}, {size}, beside Ray",
            meaning=f"{meaning}: time with Ray / with ours",
            unit="x",
            spread=faster,
            target=None if least is None else f">= {least:g} x",
            met=None if least is None else faster.median >= least,
        ),
        Figure(
            name=f"{way}, {size}",
            meaning=f"{meaning}: time with ours",
            unit="us",
            spread=spread(scaled(seconds["ours"], 1e6)),
        ),
    ]


if __name__ == "__main__":
    typer.run(main)
