"""The same experiments on ndif-actor and on what a user would pick instead.

python -m bench.peers install            # an environment for each, from PyPI; minutes, gigabytes
python -m bench.peers run                # everything that is installed, one table of ratios
python -m bench.peers run --peers nnsight,ndif-floor --users 32
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from bench.load.scenarios import SCENARIOS, Sizes
from bench.load.server import serving
from bench.peers import crowd, environments, solo
from bench.peers.catalogue import Peer, find
from bench.peers.ours import Ours
from bench.peers.process import Answers, Crowd, PeerError, PeerProcess
from bench.record import Recorder
from bench.worker import Worker

#: Tokens of a prompt, smallest and largest, and tokens that a generation makes.
_PROMPT_TOKENS, _NEW_TOKENS = (6, 12), 16

#: Who serves users at all: others are libraries in a user's own process.
_SERVING = ("ndif-floor", "plain-hooks")

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command()
def install(
    names: Annotated[list[str] | None, typer.Argument(help="Environments; all by default.")] = None,
) -> None:
    """Make the environments of peers, anew where they are there."""
    for name in names or environments.names():
        if name not in environments.names():
            raise typer.BadParameter(f"{name!r}: there are {', '.join(environments.names())}")
        typer.echo(f"{name}: {environments.install(name)}")


@app.command()
def run(
    model: Annotated[str, typer.Option(help="A local folder, a hub id, or `demo`.")] = "demo",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    peers: Annotated[str, typer.Option(help="Names, separated by commas, or all.")] = "all",
    rounds: Annotated[int, typer.Option(help="Alternations kept of each kind of request.")] = 11,
    users: Annotated[int, typer.Option(help="Users who ask at the same time.")] = 32,
    seconds: Annotated[float, typer.Option(help="For how long, in each round.")] = 10.0,
    crowds: Annotated[int, typer.Option(help="Alternations kept of all users together.")] = 3,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Measure one user alone, and many at the same time."""
    from ndif_actor.engine.checkpoint import resolve

    try:
        wanted = find(peers)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    folder = str(resolve(model))
    settings = {"model": model, "dtype": dtype, "users": users, "seconds": seconds}
    recorder = Recorder("peers", settings)
    with (
        serving(model, dtype) as url,
        Worker(Ours, url, users) as worker,
        _loaded(wanted, folder, dtype) as (running, notes),
    ):
        ours = _Ours(worker)
        layers, vocabulary = worker.call("sizes")
        sizes = Sizes(
            layers=layers,
            vocabulary=vocabulary,
            prompt_tokens=_PROMPT_TOKENS,
            new_tokens=_NEW_TOKENS,
        )
        able = {
            scenario: [p.name for p in wanted if p.name in running and _runs(p, scenario)]
            for scenario in SCENARIOS
        }
        figures, seen, odd = solo.measure(ours, running, able, sizes, rounds, dtype)
        serving_peers = {name: running[name] for name in _SERVING if name in running}
        more, crowd_seen = crowd.measure(
            {"ours": ours, **serving_peers},
            "hidden-states",
            sizes,
            users=users,
            seconds=seconds,
            rounds=crowds,
        )
        versions = {name: one.versions for name, one in running.items()}
        worker.call("close")
    observed: dict[str, object] = {"versions": versions, "without_figures": [*notes, *odd]}
    recorder.finish(figures + more, observed | seen | crowd_seen, out)
    for note in [*notes, *odd]:
        typer.echo(note)


class _Ours:
    """Our client in its worker process, with the methods of a peer's process."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def round(self, requests: object) -> Answers:
        answers: Answers = self._worker.call("round", requests)
        return answers

    def crowd(self, requests: object, seconds: float) -> Crowd:
        seen: Crowd = self._worker.call("crowd", requests, seconds)
        return seen


@contextmanager
def _loaded(
    wanted: list[Peer], folder: str, dtype: str
) -> Iterator[tuple[Mapping[str, PeerProcess], list[str]]]:
    """Start what can run; yield it, and why the rest can't."""
    running: dict[str, PeerProcess] = {}
    notes: list[str] = []
    with ExitStack() as stack:
        for peer in wanted:
            if peer.script is None:
                notes.append(f"{peer.name} skipped: {peer.missing}")
                continue
            python = environments.python_of(peer.environment)
            if python is None:
                command = f"python -m bench.peers install {peer.environment}"
                notes.append(f"{peer.name} skipped: not installed ({command})")
                continue
            try:
                running[peer.name] = PeerProcess(python, peer.script, folder, dtype)
            except PeerError as error:
                notes.append(f"{peer.name} skipped: {error}")
                continue
            stack.callback(running[peer.name].close)
        yield running, notes


def _runs(peer: Peer, scenario: str) -> bool:
    return peer.scenarios is None or scenario in peer.scenarios


if __name__ == "__main__":
    app()
