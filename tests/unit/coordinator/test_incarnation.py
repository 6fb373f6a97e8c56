"""An incarnation of shards over real links: joining, passes, and what loses it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ndif_actor.actor.handshake import Address, connect, serve
from ndif_actor.actor.link import Link
from ndif_actor.coordinator.incarnation import Incarnation
from ndif_actor.errors import ReplicaLost
from ndif_actor.messages import (
    FromShard,
    Hello,
    Loaded,
    PassDone,
    RunPass,
    ShardFailed,
    ToShard,
)

Shards = list[Link[ToShard]]
PASS = RunPass(sequence=3, layout="packed", groups=[])


@asynccontextmanager
async def joined(folder: Path, count: int = 2) -> AsyncIterator[tuple[Incarnation, Shards]]:
    """An incarnation with `count` shards played by the test."""
    incarnation, order = Incarnation(count), iter(range(count))

    async def on_link(link: Link[Any]) -> None:
        await incarnation.attend(next(order), link)

    server, address = await serve(Address(path=str(folder / "s")), b"secret", FromShard, on_link)
    shards: Shards = []
    for _ in range(count):
        shards.append(await connect(address, b"secret", ToShard))
        # One after the other, so that shards[i] is rank i.
        await _until(lambda: incarnation.refusal(hello(len(shards) - 1, count)) is not None)
    try:
        yield incarnation, shards
    finally:
        for shard in shards:
            await shard.close()
        await asyncio.wait_for(incarnation.gone.wait(), 5)
        server.close()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def loaded(rank: int) -> Loaded:
    return Loaded(rank=rank, device="cpu", load_s=0.0, parameter_bytes=0)


def done(rank: int, sequence: int = 3) -> PassDone:
    return PassDone(rank=rank, sequence=sequence, forward_s=0.1)


def hello(rank: int, world_size: int = 2) -> Hello:
    return Hello(rank=rank, world_size=world_size, host="h", pid=1)


async def test_a_incarnation_is_ready_when_every_rank_has_loaded(tmp_path: Path) -> None:
    async with joined(tmp_path) as (incarnation, shards):
        assert incarnation.state == "0 of 2 shards have loaded"
        await shards[0].send(loaded(0))
        await _until(lambda: len(incarnation.loaded) == 1)
        assert not incarnation.all_loaded.is_set()
        await shards[1].send(loaded(1))
        await asyncio.wait_for(incarnation.all_loaded.wait(), 5)

        assert incarnation.state == "ok"


async def test_who_is_missing_is_named() -> None:
    assert Incarnation(3).state == "waiting for shards 0, 1, 2 of 3 to join"


async def test_a_shard_that_does_not_belong_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with joined(tmp_path) as (incarnation, _):
        assert incarnation.refusal(hello(1)) == "rank 1 has joined already"
        assert incarnation.refusal(hello(2)) == "there is no rank 2 among 2"
        wrong = incarnation.refusal(hello(0, world_size=4))
        assert wrong == "it expects 4 shards and the replica has 2"
        incarnation.lose("for a test")
        assert incarnation.refusal(hello(0)) == "the replica is being restarted"


async def test_every_shard_gets_a_pass_and_answers_come_in_the_order_of_ranks(
    tmp_path: Path,
) -> None:
    async with joined(tmp_path) as (incarnation, shards):
        constant = memoryview(b"constant")
        running = asyncio.create_task(incarnation.run_pass(PASS, [constant], timeout_s=5, log=list))
        for shard in shards:
            received = await shard.receive()
            assert received.message == PASS
            assert bytes(received.buffers[0]) == b"constant"
        await shards[1].send(done(1))
        await shards[1].send(done(1, sequence=2))  # of another pass: ignored
        await shards[0].send(done(0))

        answers = await running

        assert [answer.message.rank for answer in answers] == [0, 1]


async def test_a_shard_that_goes_away_ends_the_pass_at_once(tmp_path: Path) -> None:
    async with joined(tmp_path) as (incarnation, shards):
        running = asyncio.create_task(incarnation.run_pass(PASS, [], timeout_s=60, log=list))
        await shards[0].receive()
        await shards[1].close()

        with pytest.raises(ReplicaLost, match="shard 1 is gone"):
            await asyncio.wait_for(running, 5)

        assert "shard 1" in await incarnation.lost
        with pytest.raises(ReplicaLost, match="shard 1 is gone"):
            await incarnation.run_pass(PASS, [], timeout_s=60, log=list)


async def test_a_pass_that_takes_too_long_loses_the_incarnation(tmp_path: Path) -> None:
    async with joined(tmp_path) as (incarnation, _):
        with pytest.raises(ReplicaLost, match="forward 3 took longer than 0 s"):
            await incarnation.run_pass(PASS, [], timeout_s=0.05, log=list)


async def test_a_shard_that_reports_a_failure_is_quoted(tmp_path: Path) -> None:
    async with joined(tmp_path) as (incarnation, shards):
        await shards[1].send(ShardFailed(rank=1, message="out of memory"))

        assert await asyncio.wait_for(incarnation.lost, 5) == "shard 1 failed: out of memory"
        assert incarnation.refused_to_load


async def test_the_first_reason_counts() -> None:
    incarnation = Incarnation(1)
    incarnation.lose("first")
    incarnation.lose("second")

    assert await incarnation.lost == "first"
