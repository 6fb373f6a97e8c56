"""How long a model takes to load, beside reading its files and beside transformers alone.

Each load runs in a fresh process that has imported what it needs; the files are in the page cache.
What the server does beyond transformers: it learns the model's hook points, probes whether rows of
several users can share a forward, and makes its KV cache.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from bench.load.server import serving
from bench.measure import Figure, alternate, differences, ratios, spread
from bench.record import Recorder
from bench.worker import Worker


class Loading:
    """A process that has imported what loading takes, and loads once."""

    def __init__(self) -> None:
        import transformers

        import ndif_actor.engine.engine

        self._imported = (transformers, ndif_actor.engine.engine)

    def files(self, folder: str, dtype: str) -> float:
        """Read the weights into memory of our own; return the seconds."""
        began = time.perf_counter()
        for file in sorted(Path(folder).glob("*.safetensors")):
            with file.open("rb", buffering=0) as opened:
                opened.readinto(bytearray(file.stat().st_size))
        return time.perf_counter() - began

    def transformers(self, folder: str, dtype: str) -> float:
        """Load with transformers alone; return the seconds."""
        from transformers import AutoModelForCausalLM

        began = time.perf_counter()
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return time.perf_counter() - began

    def engine(self, folder: str, dtype: str) -> float:
        """Load as a shard does that is alone; return the seconds."""
        from ndif_actor.engine.engine import Engine

        began = time.perf_counter()
        Engine.load(Path(folder), dtype=dtype, device="cpu", rank=0, world_size=1)
        return time.perf_counter() - began


def main(
    model: Annotated[str, typer.Option(help="A local folder, a hub id, or `demo`.")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, ...")] = "bfloat16",
    rounds: Annotated[int, typer.Option(help="Alternations kept.")] = 5,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Measure loading a model with our engine, with transformers, and as a whole server."""
    from ndif_actor.engine.checkpoint import resolve

    folder = str(resolve(model))
    recorder = Recorder("load_time", {"model": model, "dtype": dtype, "rounds": rounds})

    def loaded(way: str) -> float:
        with Worker(Loading) as worker:
            return float(worker.call(way, folder, dtype))

    seconds = alternate(
        {
            "files": lambda _: loaded("files"),
            "transformers": lambda _: loaded("transformers"),
            "engine": lambda _: loaded("engine"),
            "server": lambda _: _server_s(model, dtype),
        },
        rounds,
    )
    recorder.finish(_figures(seconds), dict(seconds), out)


def _server_s(model: str, dtype: str) -> float:
    """Return the seconds from starting a server until it says that it is ready."""
    began = time.perf_counter()
    with serving(model, dtype):
        return time.perf_counter() - began


def _figures(seconds: dict[str, list[float]]) -> list[Figure]:
    return [
        Figure(
            name="engine beside the files",
            meaning="time to load the engine / to read its weights into memory",
            unit="x",
            spread=spread(ratios(seconds["engine"], seconds["files"])),
        ),
        Figure(
            name="engine beside transformers",
            meaning="time to load the engine / of from_pretrained",
            unit="x",
            spread=spread(ratios(seconds["engine"], seconds["transformers"])),
        ),
        Figure(
            name="what the engine adds",
            meaning="time to load the engine, less that of from_pretrained",
            unit="s",
            spread=spread(differences(seconds["engine"], seconds["transformers"])),
        ),
        Figure(
            name="server ready",
            meaning="from starting `ndif-actor serve` until it takes requests, imports included",
            unit="s",
            spread=spread(seconds["server"]),
        ),
    ]


if __name__ == "__main__":
    typer.run(main)
