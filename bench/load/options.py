"""The options of `ndif-actor-bench load`: read, checked, and made into a job."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import NoReturn

from bench.load.drive import Job, LoadError
from bench.load.loops import Window
from bench.load.recording import check_name
from bench.load.run import Loop, Settings
from bench.load.scenarios import MIXTURE, SCENARIOS, parse_weights
from bench.load.thresholds import Thresholds

#: Exit status where something can't be done as asked.
USAGE = 2

#: Clients of a closed loop by default, and those that share the arrivals of an open one.
_USERS, _CLIENTS = "1,2,4,8,16,32", 32

_KEY_VARIABLE = "NDIF_API_KEY"

_BOUNDS = {
    "max_p50": "seconds",
    "max_p95": "seconds",
    "max_p99": "seconds",
    "min_throughput": "results a second",
    "min_goodput": "results within --slo a second",
}


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} ({self.prog} --help lists the options)", file=sys.stderr)
        sys.exit(USAGE)


def parser_class() -> type[argparse.ArgumentParser]:
    """Return the kind of parser whose errors are one line."""
    return _Parser


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of a load test."""
    mixture = ", ".join(f"{name}={weight:g}" for name, weight in MIXTURE.items())
    meanings = "; ".join(f"{name}: {scenario.meaning}" for name, scenario in SCENARIOS.items())
    parser.add_argument("url", help="of a running server: http://HOST:PORT")
    who = parser.add_argument_group("who sends when")
    who.add_argument(
        "--users",
        type=_counts,
        help=f"closed loop: N users who wait for their answers, a load for each N [{_USERS}]",
    )
    who.add_argument(
        "--rate",
        type=_rates,
        help="open loop: arrivals a second, a load for each; --users is then how many clients "
        f"share them [{_CLIENTS}]",
    )
    who.add_argument("--replay", type=Path, help="send a recording again (.jsonl or .msgpack)")
    who.add_argument("--speed", type=_positive, default=1.0, help="of the replay [1]")
    who.add_argument("--think", type=_seconds, default=0.0, help="mean pause of a user, s [0]")
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--scenario",
        type=_weights,
        default="hidden-states",
        help=f"one of {', '.join(SCENARIOS)}; NAME=WEIGHT,NAME=WEIGHT with weights that add up to "
        f"1; or mixture ({mixture}). {meanings}",
    )
    what.add_argument("--prompt-tokens", type=_range, default="24", help="N or N-M, random [24]")
    what.add_argument("--new-tokens", type=_count, default=16, help="of a generation [16]")
    what.add_argument("--seed", type=int, default=0, help="same seed, same requests [0]")
    when = parser.add_argument_group("how long")
    when.add_argument("--duration", type=_positive, default=10.0, help="of each load, s [10]")
    when.add_argument("--warmup", type=_seconds, default=2.0, help="before it, not counted, s [2]")
    when.add_argument("--drain", type=_seconds, default=30.0, help="after it, to end, s [30]")
    when.add_argument("--timeout", type=_positive, default=120.0, help="of one request, s [120]")
    server = parser.add_argument_group("the server")
    server.add_argument("--model", help="where it offers several")
    server.add_argument(
        "--api-keys",
        type=Path,
        help=f"file of API keys, one a line, which users take in turn; or set {_KEY_VARIABLE}",
    )
    _add_outputs(parser)


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    out = parser.add_argument_group("what comes of it")
    out.add_argument("--out", type=Path, help="the record [load-DATE.json]; plots and page beside")
    out.add_argument("--no-plots", action="store_true", help="write neither plots nor page")
    out.add_argument(
        "--no-requests", action="store_true", help="leave single requests out of the record"
    )
    out.add_argument("--record", type=Path, help="write what was sent here, to be replayed")
    out.add_argument("--slo", type=_positive, default=2.0, help="latency of good results, s [2]")
    bounds = parser.add_argument_group("thresholds: if a load misses one, the exit status is 1")
    for name, unit in _BOUNDS.items():
        bounds.add_argument(f"--{name.replace('_', '-')}", type=_seconds, help=unit)
    bounds.add_argument("--max-errors", type=_whole, help="requests without a result")


def thresholds(given: argparse.Namespace) -> Thresholds:
    """Return the thresholds that were given."""
    return Thresholds(
        max_errors=given.max_errors, **{name: getattr(given, name) for name in _BOUNDS}
    )


def job(given: argparse.Namespace) -> Job:
    """Return what is to be done.

    Raises:
        LoadError: options contradict each other, or the file of keys can't be read.
        RecordingError: a recording can't have that name.
    """
    loop = _loop(given)
    _check(given, loop)
    keys = _keys(given.api_keys)
    window = Window(
        warmup_s=0.0 if loop == "replay" else given.warmup,
        duration_s=given.duration,
        drain_s=given.drain,
        timeout_s=given.timeout,
    )
    settings = Settings(
        loop=loop,
        weights={} if loop == "replay" else given.scenario,
        think_s=given.think,
        window=window,
        prompt_tokens=given.prompt_tokens,
        new_tokens=given.new_tokens,
        seed=given.seed,
        slo_s=given.slo,
        keys=len(keys),
        recording=given.replay.name if loop == "replay" else None,
        speed=given.speed,
    )
    levels: list[float] = list(given.rate or [])
    users = given.users or _counts(_USERS if loop == "closed" else str(_CLIENTS))
    if loop == "closed":
        levels = [float(count) for count in users]
    return Job(
        url=given.url,
        settings=settings,
        model=given.model,
        keys=keys,
        levels=levels,
        users=users[0],
        recording=given.replay,
    )


def _loop(given: argparse.Namespace) -> Loop:
    if given.replay is not None:
        return "replay"
    return "open" if given.rate is not None else "closed"


def _check(given: argparse.Namespace, loop: Loop) -> None:
    """Refuse what contradicts itself, before anything is connected."""
    if not given.url.startswith(("http://", "https://")):
        raise LoadError(f"{given.url!r} is no address of a running server: give http://HOST:PORT")
    if loop == "replay" and (given.users or given.rate):
        raise LoadError("--replay has its own users and times: leave --users and --rate out")
    if loop == "open" and given.users and len(given.users) > 1:
        raise LoadError("--rate wants one number of clients: give --users N")
    if loop != "closed" and given.think:
        raise LoadError("--think is for users who wait for answers: leave --rate and --replay out")
    if given.record is not None:
        check_name(given.record)
        if len(given.rate or given.users or [1] * 6) > 1 and loop != "replay":
            raise LoadError("--record is of one load: give one number of --users or one --rate")


def _keys(path: Path | None) -> list[str]:
    if path is None:
        key = os.environ.get(_KEY_VARIABLE, "").strip()
        return [key] if key else []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise LoadError(f"can't read API keys from {path}: {error.strerror}") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise LoadError(f"{path} has no API key: put one on each line")
    return keys


# ---------------------------------------------------------------- values


def _number(text: str, lowest: float, above: bool, words: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < lowest or (above and value == lowest):
        raise argparse.ArgumentTypeError(f"{text!r} is no {words}")
    return value


def _positive(text: str) -> float:
    return _number(text, 0.0, True, "number above 0")


def _seconds(text: str) -> float:
    return _number(text, 0.0, False, "number from 0 on")


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(part.strip()) for part in text.split(",")]


def _rates(text: str) -> list[float]:
    return [_positive(part.strip()) for part in text.split(",")]


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    first, last = _count(low), _count(high or low)
    if last < first:
        raise argparse.ArgumentTypeError(f"{text!r}: the smaller number comes first")
    return first, last


def _weights(text: str) -> dict[str, float]:
    try:
        return parse_weights(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
