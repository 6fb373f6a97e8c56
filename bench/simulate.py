"""Simulate a server under the load of many users, and find how many it can bear.

    python -m bench.simulate                                  # Llama 405B on 16 GPUs
    python -m bench.simulate --billions 70 --gpus 4 --users 50,100,200
    python -m bench.simulate --sweeps 0 --hours 4 --seed 1

The scheduler, the queue's limits and the prices of requests are the server's own code; the times of
forwards are modelled from the rates of the hardware (see bench/simulation/cost.py), not measured.
The same seed gives the same figures, to the last digit.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from bench.simulation.cost import ForwardCost, Hardware, cache_tokens, roofline
from bench.simulation.models import CONFIGS, size, write_folder
from bench.simulation.outcome import Outcome, knee, summarise
from bench.simulation.workload import KINDS, USERS, Prices, price
from bench.simulation.world import Server, simulate
from ndif_actor.config import ServerConfig
from ndif_actor.coordinator import events
from ndif_actor.coordinator.admission import RequestLimits
from ndif_actor.coordinator.capacity import CacheSize

_PAGE_TOKENS = 16

_COLUMNS = (
    *("users", "req/s", "good/s", "late", "p50", "p95", "p99"),
    *("researcher", "sweep", "groups", "busy"),
)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All outcomes, by policy, and the settings they came from."""

    settings: dict[str, int | float | str]
    cost: ForwardCost
    policies: dict[str, list[Outcome]]
    knees: dict[str, int | None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate as the command line says, and print a table for each policy."""
    given = _parser().parse_args(arguments)
    config, console = CONFIGS[given.billions], Console()
    model, hardware = size(config), Hardware(devices=given.gpus)
    pages = cache_tokens(model, hardware) // _PAGE_TOKENS
    if not pages:
        sys.exit(f"the weights of {given.billions}B do not fit on {given.gpus} GPUs of 80 GB")
    cost = roofline(model, hardware, request_s=given.request_ms / 1000)
    began = time.perf_counter()
    pass_bytes = int(given.pass_gib * 2**30)
    prices = asyncio.run(_prices(given.billions, pages, pass_bytes))
    console.print(f"requests priced in {time.perf_counter() - began:.0f} s")
    policies: dict[str, list[Outcome]] = {}
    for name, server in _policies(cost, pages, pass_bytes).items():
        policies[name] = []
        for users in given.users:
            outcome = _run(server, prices, users, given)
            policies[name].append(outcome)
            if outcome.late > 0.5:
                break  # more users tell nothing new
        _print(console, name, policies[name])
    knees = {name: found.users if (found := knee(own)) else None for name, own in policies.items()}
    for name, users_at in knees.items():
        console.print(f"{name}: at most 5 % late up to [bold]{users_at or 'no'}[/] users")
    if given.out:
        settings = {k: v for k, v in vars(given).items() if isinstance(v, int | float | str)}
        report = Report(settings=settings, cost=cost, policies=policies, knees=knees)
        given.out.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulate",
        description=(__doc__ or "").partition("\n\n")[0],
    )
    parser.add_argument("--billions", type=int, choices=sorted(CONFIGS), default=405)
    parser.add_argument("--gpus", type=int, default=16, help="of 80 GB each")
    parser.add_argument(
        "--users",
        type=lambda text: [int(number) for number in text.split(",")],
        default=[50, 100, 200, 400, 800, 1600],
        help="researchers, each run with so many",
    )
    parser.add_argument("--sweeps", type=int, default=5, help="scripts that send 64 at once")
    parser.add_argument("--hours", type=float, default=0.5)
    parser.add_argument("--objective", type=float, default=5.0, help="seconds to a first answer")
    parser.add_argument(
        "--request-ms", type=float, default=1.0, help="of a forward, for each request in it"
    )
    parser.add_argument(
        "--pass-gib", type=float, default=8.0, help="max_pass_bytes, of all GPUs together"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write all figures here, as JSON")
    return parser


async def _prices(billions: int, pages: int, pass_bytes: int) -> Prices:
    defaults = ServerConfig(model="simulated")
    limits = RequestLimits(value_bytes=pass_bytes, saved_bytes=defaults.max_saved_bytes)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(CONFIGS[billions], Path(folder))
        return await price(Path(folder), KINDS, CacheSize(pages, _PAGE_TOKENS), limits)


def _policies(cost: ForwardCost, pages: int, pass_bytes: int) -> dict[str, Server]:
    defaults = ServerConfig(model="simulated")
    shared = Server(
        cost=cost,
        budget=events.Budget(defaults.max_pass_tokens, pass_bytes),
        limits=events.QueueLimits(
            max_requests=defaults.max_queued,
            max_requests_per_user=defaults.max_queued_per_user,
            max_bytes=defaults.max_queued_bytes,
        ),
        num_pages=pages,
        page_tokens=_PAGE_TOKENS,
        max_swapped_tokens=defaults.max_swapped_tokens,
    )
    everybody = events.QueueLimits(max_requests_per_user=defaults.max_queued)
    return {
        "shared forwards, users in turns": shared,
        "shared forwards, first come first served": replace(
            shared, limits=everybody, knows_users=False
        ),
        "one request at a time": replace(shared, limits=everybody, knows_users=False, serial=True),
    }


def _run(server: Server, prices: Prices, users: int, given: argparse.Namespace) -> Outcome:
    people = [(USERS["researcher"], users), (USERS["sweep"], given.sweeps)]
    duration_s = given.hours * 3600
    history = simulate(server, prices, KINDS, people, duration_s=duration_s, seed=given.seed)
    return summarise(history, given.objective, warmup_s=duration_s / 10)


def _print(console: Console, name: str, outcomes: Sequence[Outcome]) -> None:
    table = Table(
        title=name,
        caption="seconds to the first token or result: of all, p95 of researchers and of sweeps",
        title_justify="left",
    )
    columns = (
        "users  req/s  good/s  late  first p50  p95  p99  researcher p95  sweep p95  groups  busy"
    )
    for column in columns.split("  "):
        table.add_column(column, justify="right")
    for one in outcomes:
        researcher, sweep = (one.waiting.get(group) for group in ("researcher", "sweep"))
        table.add_row(
            str(one.users),
            f"{one.ended_per_s:.1f}",
            f"{one.good_per_s:.1f}",
            f"{one.late:.0%}",
            *(f"{seconds:.2f}" for seconds in (one.first.p50, one.first.p95, one.first.p99)),
            f"{researcher.p95:.2f}" if researcher else "",
            f"{sweep.p95:.2f}" if sweep else "",
            f"{one.groups:.1f}",
            f"{one.busy:.0%}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
