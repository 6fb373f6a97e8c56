"""Many users sharing forwards of one server, beside bare transformers one request after another.

Server, users and reference are separate processes; while one side is measured the other is idle.
The reference runs `model(ids)` with a forward hook that clones, from token ids; the users' side
includes writing the experiment, the wire, tokenisation, checks, queueing and the arrays.

The same requests in one packed forward of the engine, in a process of its own, tell what of that
the rest of the system takes: client, wire, admission, queue and links.

A request that saves only a layer lets the server stop after that layer. So that the comparison
with a whole forward is fair as well, it is also made with the last token's logits saved; one user
alone is compared only like that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from bench.load.researchers import Researchers, Round
from bench.load.server import serving
from bench.measure import Figure, alternate, differences, ratios, scaled, spread
from bench.packed import PackedModel
from bench.prompts import LENGTHS, draw
from bench.record import Recorder
from bench.reference import BareModel
from bench.worker import Worker

_TARGET_GAIN = 4.0

#: What the whole system is to reach of the throughput of its packed forward.
_TARGET_PART = 0.8

#: What one user alone may wait longer than for the bare forward: milliseconds, and percent of it.
_TARGET_MS, _TARGET_PERCENT = 5.0, 5.0

#: Largest relative distance between a value the server gave and the reference's, for rounding.
_TOLERANCE = 0.05


def main(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, or `demo`.")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, ...")] = "bfloat16",
    users: Annotated[int, typer.Option(help="Users who ask at the same time.")] = 32,
    rounds: Annotated[int, typer.Option(help="Alternations kept, of all users.")] = 7,
    alone: Annotated[int, typer.Option(help="Alternations kept, of one user.")] = 40,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Measure throughput of users sharing a server, and what one user alone waits longer."""
    from ndif_actor.engine.checkpoint import resolve

    folder = str(resolve(model))
    settings = {"model": model, "dtype": dtype, "users": users, "tokens": LENGTHS}
    recorder = Recorder("shared_forward", settings)
    with (
        serving(model, dtype) as url,
        Worker(BareModel, folder, dtype) as bare,
        Worker(PackedModel, folder, dtype) as engine,
        Worker(Researchers, url, users) as researchers,
    ):
        _check(bare, researchers)
        shared, sharing = _together(bare, engine, researchers, users, rounds)
        single, waiting = _alone(bare, researchers, alone)
        researchers.call("close")
    recorder.finish(shared + single, sharing | waiting, out)


def _check(bare: Worker, researchers: Worker) -> None:
    """Make sure that both sides compute the same, and prompts are as long as they should be."""
    layers = bare.call("num_layers")
    requests = draw(0, 32, layers)
    lengths = bare.call("lengths", requests)
    if min(lengths) < LENGTHS[0] or max(lengths) > LENGTHS[1]:
        raise SystemExit(
            f"with this tokenizer prompts have {min(lengths)} to {max(lengths)} tokens"
        )
    for request in requests[:3]:
        expected, got = bare.call("saved", request), researchers.call("saved", request)
        apart = sum((a - b) ** 2 for a, b in zip(expected, got, strict=True)) ** 0.5
        if apart > _TOLERANCE * sum(a * a for a in expected) ** 0.5:
            raise SystemExit(f"server and reference disagree at layer {request.layer}")


def _together(
    bare: Worker, engine: Worker, researchers: Worker, users: int, rounds: int
) -> tuple[list[Figure], dict[str, object]]:
    """Compare all users at once with bare forwards one after another, and with a packed one."""
    layers = bare.call("num_layers")

    def reference(number: int) -> float:
        return float(sum(bare.call("one_after_another", draw(number, users, layers), False)))

    def shared(number: int, logits: bool) -> Round:
        asked: Round = researchers.call("ask", draw(number, users, layers), logits)
        return asked

    def packed(number: int, logits: bool) -> float:
        return float(engine.call("together", draw(number, users, layers), logits))

    seen = alternate(
        {
            "reference": reference,
            "layer": lambda number: shared(number, False),
            "packed layer": lambda number: packed(number, False),
            "layer and logits": lambda number: shared(number, True),
            "packed layer and logits": lambda number: packed(number, True),
        },
        rounds,
        warmups=2,
    )
    bare_s = _seconds(seen["reference"])
    figures: list[Figure] = []
    observations: dict[str, object] = {"reference_s": bare_s}
    for what in ("layer", "layer and logits"):
        asked = [each for each in seen[what] if isinstance(each, Round)]
        gain = spread(ratios(bare_s, [each.seconds for each in asked]))
        judged = what == "layer"
        figures.append(
            Figure(
                name=f"{users} users saving a {what}",
                meaning="time of bare forwards one after another / of all users at once",
                unit="x",
                spread=gain,
                target=f">= {_TARGET_GAIN:g} x" if judged else None,
                met=gain.median >= _TARGET_GAIN if judged else None,
            )
        )
        packed_s = _seconds(seen[f"packed {what}"])
        part = spread(ratios(packed_s, [each.seconds for each in asked]))
        figures.append(
            Figure(
                name=f"{users} users saving a {what}, of the packed forward",
                meaning="throughput of all users at once / of one packed forward by itself",
                unit="x",
                spread=part,
                target=f">= {_TARGET_PART:g} x",
                met=part.median >= _TARGET_PART,
            )
        )
        observations[f"{users} users saving a {what}"] = msgspec.to_builtins(asked)
        observations[f"packed, saving a {what}, s"] = packed_s
    return figures, observations


def _seconds(seen: Sequence[object]) -> list[float]:
    return [each for each in seen if isinstance(each, float)]


def _alone(
    bare: Worker, researchers: Worker, rounds: int
) -> tuple[list[Figure], dict[str, object]]:
    """Compare one user's request with the same bare forward; both save logits too."""
    layers = bare.call("num_layers")

    def reference(number: int) -> float:
        return float(bare.call("one_after_another", draw(number, 1, layers), True)[0])

    def one(number: int) -> Round:
        asked: Round = researchers.call("ask", draw(number, 1, layers), True)
        return asked

    seen = alternate({"reference": reference, "user": one}, rounds, warmups=3)
    bare_s = [s for s in seen["reference"] if isinstance(s, float)]
    asked = [each for each in seen["user"] if isinstance(each, Round)]
    waited_ms = scaled(differences([each.seconds for each in asked], bare_s), 1e3)
    allowed = [_TARGET_MS + _TARGET_PERCENT / 100 * 1e3 * s for s in bare_s]
    around_ms = [1e3 * (each.seconds - each.forward_s) for each in asked]
    figures = [
        Figure(
            name="one user, longer",
            meaning="time of one user's request - of the bare forward",
            unit="ms",
            spread=spread(waited_ms),
        ),
        Figure(
            name="one user, beyond allowance",
            meaning=f"the same - ({_TARGET_MS:g} ms + {_TARGET_PERCENT:g} % of the bare forward)",
            unit="ms",
            spread=spread(differences(waited_ms, allowed)),
            target="<= 0 ms",
            met=spread(differences(waited_ms, allowed)).median <= 0,
        ),
        Figure(
            name="one user, around the forward",
            meaning="time of one user's request - of the server's forward in it",
            unit="ms",
            spread=spread(around_ms),
        ),
    ]
    observed = {"one user": msgspec.to_builtins(asked), "one user, reference_s": bare_s}
    return figures, observed


if __name__ == "__main__":
    typer.run(main)
