"""The simulation repeats itself to the last digit, and what it tells follows from its parts."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from bench.simulation.cost import ForwardCost, Hardware, Load, ModelSize, Sample, fit, roofline
from bench.simulation.outcome import knee, summarise
from bench.simulation.workload import KINDS, USERS, Prices, User, price
from bench.simulation.world import History, Server, simulate
from ndif_actor.coordinator import events
from ndif_actor.coordinator.admission import RequestLimits
from ndif_actor.coordinator.capacity import CacheSize
from tests.conftest import MakeModel

COST = ForwardCost(base_s=0.01, weights_s=0.02, row_s=1e-4, request_s=1e-3)
SERVER = Server(
    cost=COST,
    budget=events.Budget(tokens=1024),
    limits=events.QueueLimits(max_requests=100_000, max_requests_per_user=100_000),
    num_pages=20_000,
)
SHORT = [replace(kind, new_tokens=20) if kind.new_tokens else kind for kind in KINDS]
RESEARCHERS = replace(USERS["researcher"], think_s=5.0)


@pytest.fixture(scope="module")
def prices(model_folder: MakeModel) -> Prices:
    limits = RequestLimits(value_bytes=1 << 40, saved_bytes=1 << 40)
    folder: Path = model_folder("llama", torch.float32)
    return asyncio.run(price(folder, SHORT, CacheSize(20_000, 16), limits))


def run(
    server: Server, prices: Prices, users: list[tuple[User, int]], duration_s: float = 60.0
) -> History:
    return simulate(server, prices, SHORT, users, duration_s=duration_s, seed=3)


def test_the_same_seed_gives_the_same_history(prices: Prices) -> None:
    users = [(RESEARCHERS, 20), (USERS["sweep"], 2)]

    first, second = run(SERVER, prices, users), run(SERVER, prices, users)

    assert first == second
    assert len(first.requests) > 200


def test_another_seed_gives_another_history(prices: Prices) -> None:
    users = [(RESEARCHERS, 5)]
    other = simulate(SERVER, prices, SHORT, users, duration_s=60.0, seed=4)

    assert run(SERVER, prices, users) != other


def test_nothing_is_lost_and_no_time_runs_backwards(prices: Prices) -> None:
    history = run(SERVER, prices, [(RESEARCHERS, 40), (USERS["sweep"], 2)])

    for one in history.requests:
        times = [one.sent_s, one.started_s, one.first_s, one.ended_s]
        known = [time for time in times if time is not None]
        assert known == sorted(known)
        assert times[: len(known)] == known
    # One forward at a time, each after the last one.
    for before, after in zip(history.forwards, history.forwards[1:], strict=False):
        assert after.start_s >= before.start_s + before.seconds - 1e-9
    unanswered = [one for one in history.requests if one.ended_s is None]
    assert len(unanswered) < len(history.requests) / 4


def test_a_forward_carries_no_more_rows_than_its_budget(prices: Prices) -> None:
    history = run(SERVER, prices, [(USERS["sweep"], 5)])

    assert max(one.load.requests for one in history.forwards) > 4
    # The first of a forward may be larger by itself.
    assert all(one.load.rows <= 1024 or one.load.requests == 1 for one in history.forwards)


def test_one_at_a_time_shares_no_forward_and_serves_fewer(prices: Prices) -> None:
    users = [(RESEARCHERS, 150)]

    shared = summarise(run(SERVER, prices, users), objective_s=2.0)
    serial = summarise(run(replace(SERVER, serial=True), prices, users), objective_s=2.0)

    assert serial.groups == 1.0
    assert shared.groups > 2
    assert shared.ended_per_s > 3 * serial.ended_per_s
    assert shared.late < serial.late


def test_turns_spare_researchers_the_wait_for_a_sweep(prices: Prices) -> None:
    reading = User(name="researcher", mix={"read": 1.0}, think_s=5.0)
    sweeps = replace(USERS["sweep"], together=200, think_s=1.0)
    users = [(reading, 5), (sweeps, 2)]

    turns = summarise(run(SERVER, prices, users), objective_s=2.0)
    line = summarise(run(replace(SERVER, knows_users=False), prices, users), objective_s=2.0)

    assert turns.waiting["researcher"].p95 < line.waiting["researcher"].p95 / 3


def test_a_full_queue_refuses_and_clients_come_back(prices: Prices) -> None:
    small = replace(SERVER, limits=events.QueueLimits(max_requests=4))

    history = run(small, prices, [(RESEARCHERS, 40)])

    assert sum(one.refusals for one in history.requests) > 0
    assert sum(one.ended_s is not None for one in history.requests if one.refusals) > 0


def test_waiting_of_nobody_is_not_a_number() -> None:
    outcome = summarise(History([], [], 10.0), objective_s=1.0)

    assert math.isnan(outcome.first.p95)
    assert (outcome.sent, outcome.late, outcome.busy) == (0, 0.0, 0.0)


def test_the_knee_is_the_last_before_too_many_are_late(prices: Prices) -> None:
    few = summarise(run(SERVER, prices, [(RESEARCHERS, 5)]), objective_s=2.0)
    sizes = [replace(few, users=n, late=late) for n, late in ((10, 0.0), (20, 0.04), (40, 0.2))]

    assert knee(sizes) == sizes[1]
    assert knee([sizes[2]]) is None
    assert knee([]) is None


def test_a_fit_finds_the_cost_that_forwards_were_made_with() -> None:
    cost = ForwardCost(base_s=0.012, weights_s=0.0, row_s=2e-4, request_s=5e-4)
    loads = [Load(rows, requests) for rows in (8, 100, 700) for requests in (1, 4, 30)]

    found = fit([Sample(load, cost.seconds(load)) for load in loads])

    for load in loads:
        assert found.seconds(load) == pytest.approx(cost.seconds(load))
    assert found.request_s == pytest.approx(5e-4)


def test_a_fit_of_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        fit([Sample(Load(1, 1), 0.1)])
    with pytest.raises(ValueError, match="several sizes"):
        fit([Sample(Load(8, 1), 0.1)] * 3)


def test_a_fit_has_no_negative_part() -> None:
    # More requests of the same rows were faster, by chance.
    samples = [Sample(Load(10, 1), 0.03), Sample(Load(10, 2), 0.02), Sample(Load(100, 2), 0.1)]

    found = fit(samples)

    assert min(found.base_s, found.row_s, found.request_s) >= 0


def test_rooflines_follow_the_hardware() -> None:
    model = ModelSize(parameters=405e9, layers=126, kv_heads=8, head_dim=128)
    eight = roofline(model, Hardware(devices=8), request_s=0.0)
    sixteen = roofline(model, Hardware(devices=16), request_s=0.0)

    assert eight.row_s == pytest.approx(2 * sixteen.row_s)
    assert eight.weights_s == pytest.approx(2 * sixteen.weights_s)
    assert model.kv_bytes == 516_096
    few, many = Load(rows=1, requests=1), Load(rows=4096, requests=1)
    assert sixteen.seconds(few) == pytest.approx(sixteen.base_s + sixteen.weights_s, rel=1e-3)
    assert sixteen.seconds(many) == pytest.approx(sixteen.base_s + 4096 * sixteen.row_s, rel=1e-3)
