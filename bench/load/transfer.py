"""How fast saved activations reach the client over loopback, beside a plain socket.

One user saves the output of the embedding so many times that it fills the size asked for: much to
carry and nothing to compute. The same request saving one number tells what everything else takes;
what remains is the transfer: copies out of the forward, shard to coordinator, HTTP, and the
client's arrays. For comparison, as much is saved from a whole forward: the output of every layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from bench.load.collector import Collected, Collector
from bench.load.loopback import Sender
from bench.load.server import serving
from bench.measure import Figure, alternate, differences, ratios, spread
from bench.record import Recorder
from bench.worker import Worker

_MEGA = 10**6
_TARGET_MB_S = 400.0

#: Whole forwards that are run; each takes seconds.
_FORWARDS = 3


def main(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, or `demo`.")] = "demo",
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, ...")] = "bfloat16",
    mebibytes: Annotated[int, typer.Option(help="How much is saved, in MiB.")] = 64,
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 4096,
    rounds: Annotated[int, typer.Option(help="Alternations kept.")] = 15,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Measure the rate at which a client receives saved activations."""
    num_bytes = mebibytes << 20
    settings = {"model": model, "dtype": dtype, "mebibytes": mebibytes, "tokens": tokens}
    recorder = Recorder("transfer", settings)
    with (
        serving(model, dtype) as url,
        Worker(Collector, url, num_bytes) as collector,
        Worker(Sender, num_bytes) as sender,
    ):
        port = sender.call("port")
        seen = alternate(
            {
                "whole": lambda _: collector.call("save_embeddings", tokens, True),
                "one number": lambda _: collector.call("save_embeddings", tokens, False),
                "socket": lambda _: collector.call("fetch", port),
            },
            rounds,
            warmups=2,
        )
        layers = [collector.call("save_every_layer") for _ in range(_FORWARDS)]
        collector.call("close")
    figures = _embeddings(seen["whole"], seen["one number"], seen["socket"], num_bytes)
    observations = {name: msgspec.to_builtins(each) for name, each in seen.items()}
    observations["every layer"] = msgspec.to_builtins(layers)
    recorder.finish([*figures, *_every_layer(layers)], observations, out)


def _embeddings(
    whole: list[Collected], one: list[Collected], socket_s: list[float], socket_bytes: int
) -> list[Figure]:
    megabytes = [each.num_bytes / _MEGA for each in whole]
    transfer_s = differences([each.seconds for each in whole], [each.seconds for each in one])
    received = ratios(megabytes, transfer_s)
    plain = [socket_bytes / _MEGA / seconds for seconds in socket_s]
    rate = spread(received)
    return [
        Figure(
            name="received",
            meaning="bytes / (time of the request - of the same saving one number)",
            unit="MB/s",
            spread=rate,
            target=f">= {_TARGET_MB_S:g} MB/s",
            met=rate.median >= _TARGET_MB_S,
        ),
        _rate("end to end", "bytes / time of the request", whole, [each.seconds for each in whole]),
        Figure(
            name="plain socket",
            meaning="as many bytes through a socket into fresh memory",
            unit="MB/s",
            spread=spread(plain),
        ),
        Figure(
            name="received / plain socket",
            meaning="of the rates above, in the same round",
            unit="x",
            spread=spread(ratios(received, plain)),
        ),
    ]


def _every_layer(layers: list[Collected]) -> list[Figure]:
    return [
        _rate(
            "every layer",
            "bytes / time of a request that saves the output of every layer",
            layers,
            [each.seconds for each in layers],
        ),
        _rate(
            "every layer, after the forward",
            "bytes / (time of that request - of its forward, which copies what is saved)",
            layers,
            [each.seconds - each.forward_s for each in layers],
        ),
    ]


def _rate(name: str, meaning: str, requests: list[Collected], seconds: list[float]) -> Figure:
    megabytes = [each.num_bytes / _MEGA for each in requests]
    return Figure(
        name=name, meaning=meaning, unit="MB/s", spread=spread(ratios(megabytes, seconds))
    )


if __name__ == "__main__":
    typer.run(main)
