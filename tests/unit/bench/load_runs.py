"""Rows and records of load tests that never took place, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.load.asking import Row
from bench.load.loops import Window
from bench.load.run import Level, Run, ServerFacts, Settings
from bench.load.summary import summarise
from bench.machine import Machine, Source

WINDOW = Window(warmup_s=0.0, duration_s=10.0, drain_s=5.0, timeout_s=60.0)


def row(intended_s: float, latency_s: float, **more: Any) -> Row:
    """Return a request that was sent in time."""
    known: dict[str, Any] = {
        "scenario": "hidden-states",
        "user": 0,
        "sent_s": intended_s,
        "started_s": intended_s,
    }
    done_s = intended_s + latency_s
    return Row(intended_s=intended_s, done_s=done_s, **(known | more))


def level(rows: Sequence[Row], users: int = 1, rate: float | None = None) -> Level:
    """Return a level with these requests."""
    return Level(
        users=users,
        rate=rate,
        window=WINDOW,
        harness_cpu=0.1,
        summary=summarise(rows, WINDOW, objective_s=2.0),
        requests=list(rows),
    )


def run(*levels: Level, seed: int = 0) -> Run:
    """Return a record with these levels."""
    return Run(
        date="2026-01-01T00:00:00+00:00",
        settings=Settings(
            loop="closed",
            weights={"hidden-states": 1.0},
            think_s=0.0,
            window=WINDOW,
            prompt_tokens=(4, 8),
            new_tokens=4,
            seed=seed,
            slo_s=2.0,
        ),
        server=ServerFacts(
            url="http://127.0.0.1:1",
            version="0",
            model="<tiny>",
            kind="Tiny",
            dtype="float32",
            device="cpu",
            tensor_parallel=1,
            packed=True,
            layers=3,
            hidden_size=48,
            vocabulary=300,
        ),
        machine=Machine(
            cpu="none",
            cores=1,
            flags=[],
            memory_gib=1.0,
            kernel="none",
            threads_setting=None,
            load=0.0,
        ),
        versions={},
        source=Source(None, None),
        levels=list(levels),
    )
