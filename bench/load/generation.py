"""Many users generating on one server, beside bare `transformers.generate`.

Server, users and reference are separate processes; while one side is measured the other is idle.
All generate greedily, the same number of tokens from the same prompts. In half precision two
sides may come to differ in a token after some steps, which changes no length and no time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.generating import BareGenerator
from bench.load.server import serving
from bench.load.writers import Writers
from bench.measure import Figure, alternate, ratios, spread
from bench.prompts import LENGTHS, draw
from bench.record import Recorder
from bench.worker import Worker

_TARGET_SEQUENTIAL, _TARGET_PADDED, _TARGET_FORWARDS = 4.0, 1.0, 2.5


def main(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, or `demo`.")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, ...")] = "bfloat16",
    users: Annotated[int, typer.Option(help="Users who generate at the same time.")] = 16,
    steps: Annotated[int, typer.Option(help="Tokens each of them generates.")] = 32,
    rounds: Annotated[int, typer.Option(help="Alternations kept.")] = 3,
    newcomers: Annotated[int, typer.Option(help="Users who come while the others decode.")] = 12,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Measure tokens a second of users sharing a server, and what a new one waits for."""
    from ndif_actor.engine.checkpoint import resolve

    folder = str(resolve(model))
    settings = {"model": model, "dtype": dtype, "users": users, "steps": steps, "tokens": LENGTHS}
    recorder = Recorder("generation", settings)
    with (
        serving(model, dtype) as url,
        Worker(BareGenerator, folder, dtype) as bare,
        Worker(Writers, url, users) as writers,
    ):
        _check(bare, writers)
        shared, sharing = _together(bare, writers, users, steps, rounds)
        coming, waiting = _first_tokens(writers, users, newcomers)
        writers.call("close")
    recorder.finish(shared + coming, sharing | waiting, out)


def _check(bare: Worker, writers: Worker) -> None:
    """Make sure that both sides compute the same."""
    for prompt in _prompts(0, 3):
        if bare.call("tokens", prompt, 1) != writers.call("tokens", prompt, 1):
            raise SystemExit(f"server and reference disagree on the first token after {prompt!r}")


def _prompts(number: int, count: int) -> list[str]:
    return [request.prompt for request in draw(number, count, 1)]


def _together(
    bare: Worker, writers: Worker, users: int, steps: int, rounds: int
) -> tuple[list[Figure], dict[str, list[float]]]:
    """Compare users at once with `generate` on their prompts, and one user with it alone."""
    seen = alternate(
        {
            "users": lambda n: float(writers.call("write", _prompts(n, users), steps)),
            "sequential": lambda n: float(
                bare.call("one_after_another", _prompts(n, users), steps)
            ),
            "padded": lambda n: float(bare.call("padded", _prompts(n, users), steps)),
            "one user": lambda n: float(writers.call("write", _prompts(n, 1), steps)),
            "one bare": lambda n: float(bare.call("one_after_another", _prompts(n, 1), steps)),
        },
        rounds,
    )
    figures = []
    for name, above, below, target in (
        (f"{users} users, one after another", "sequential", "users", _TARGET_SEQUENTIAL),
        (f"{users} users, one padded batch", "padded", "users", _TARGET_PADDED),
        ("one user alone", "one bare", "one user", None),
    ):
        gain = spread(ratios(seen[above], seen[below]))
        figures.append(
            Figure(
                name=name,
                meaning=f"time of generate ({above}) / of the same tokens from the server",
                unit="x",
                spread=gain,
                target=f">= {target:g} x" if target else None,
                met=gain.median >= target if target else None,
            )
        )
    rate = [users * steps / seconds for seconds in seen["users"]]
    figures.append(
        Figure(
            name=f"{users} users, tokens",
            meaning="tokens generated / time until all have them",
            unit="tokens/s",
            spread=spread(rate),
        )
    )
    return figures, {f"{name}, s": seconds for name, seconds in seen.items()}


def _first_tokens(
    writers: Worker, users: int, newcomers: int
) -> tuple[list[Figure], dict[str, list[float]]]:
    """Let users come, one after another, while all others decode."""
    waits: list[float] = writers.call("first_tokens", _prompts(0, users), newcomers)
    seen = spread(waits)
    figure = Figure(
        name=f"first token beside {users - 1} others",
        meaning="time from asking to the first token / between two tokens of the others",
        unit="forwards",
        spread=seen,
        target=f"<= {_TARGET_FORWARDS:g} forwards",
        met=seen.median <= _TARGET_FORWARDS,
    )
    return [figure], {"first token, forwards": waits}


if __name__ == "__main__":
    typer.run(main)
