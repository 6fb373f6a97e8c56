"""A link whose bytes arrive in any pieces: every message whole, once, and in order."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace

from ndif_actor.actor.channel import ByteChannel
from ndif_actor.actor.link import Link, LinkClosed
from ndif_actor.actor.slabs import HostIdentity
from ndif_client.wire.frames import FrameLimits
from tests.integration.actor.echo import Call

#: Bytes of the buffers that are sent, around all the sizes at which the way of reading changes.
SIZES = (0, 1, 100, 5_000, 65_000, 66_000, 200_000)


async def _link(sock: socket.socket) -> Link[Call]:
    loop = asyncio.get_running_loop()
    _, channel = await loop.create_unix_connection(ByteChannel, sock=sock)
    # Of another host, so that every byte crosses the socket.
    elsewhere = replace(HostIdentity.of_this_process(), boot="elsewhere")
    return Link(channel, elsewhere, Call, FrameLimits())


async def _pass_on(
    source: asyncio.StreamReader, target: asyncio.StreamWriter, chance: random.Random
) -> None:
    """Copy bytes in pieces of random sizes, some of them joined, with pauses."""
    while data := await source.read(chance.choice((1, 7, 50, 4096, 1 << 17))):
        while data:
            size = chance.choice((1, 11, 12, 13, 300, 70_000))
            target.write(data[:size])
            data = data[size:]
            if chance.random() < 0.1:
                await asyncio.sleep(0)
    target.close()


@asynccontextmanager
async def _linked(seed: int) -> AsyncIterator[tuple[Link[Call], Link[Call]]]:
    """Yield both ends of a link, with somebody between who tears everything up."""
    (one, near), (far, other) = socket.socketpair(), socket.socketpair()
    near_reader, near_writer = await asyncio.open_unix_connection(sock=near)
    far_reader, far_writer = await asyncio.open_unix_connection(sock=far)
    chance = random.Random(seed)
    copying = [
        asyncio.create_task(_pass_on(near_reader, far_writer, chance)),
        asyncio.create_task(_pass_on(far_reader, near_writer, chance)),
    ]
    links = await _link(one), await _link(other)
    yield links
    for link in links:
        await link.close()
    for task in copying:
        task.cancel()
    await asyncio.gather(*copying, return_exceptions=True)
    for writer in (near_writer, far_writer):
        writer.close()


@pytest.mark.parametrize("seed", range(6))
async def test_messages_arrive_whole_and_in_order(seed: int) -> None:
    chance = random.Random(seed)
    sent = [(n, [chance.randbytes(chance.choice(SIZES)) for _ in range(n % 4)]) for n in range(40)]

    async with _linked(seed) as (here, there):

        async def send() -> None:
            for number, buffers in sent:
                await here.send(Call("tell", number), buffers)

        sending = asyncio.create_task(send())
        for number, buffers in sent:
            received = await there.receive()
            assert received.message == Call("tell", number)
            assert [bytes(buffer) for buffer in received.buffers] == buffers
        await sending


async def test_a_receiver_that_takes_its_time_loses_nothing() -> None:
    async with _linked(7) as (here, there):

        async def send() -> None:
            for number in range(500):
                await here.send(Call("tell", number), [bytes(1000)])

        sending = asyncio.create_task(send())
        await asyncio.sleep(0.3)
        assert there.statistics().waiting < 500
        for number in range(500):
            assert (await there.receive()).message.number == number
        await sending


async def test_asks_both_ways_at_once_are_answered() -> None:
    async with _linked(8) as (here, there):

        async def answer(link: Link[Call]) -> None:
            async for received in link:
                await received.reply(Call("echo", received.message.number + 1), received.buffers)

        answering = [asyncio.create_task(answer(link)) for link in (here, there)]
        asked = [
            link.ask(Call("echo", number), [bytes(number * 97)], timeout_s=20)
            for number in range(40)
            for link in (here, there)
        ]
        numbers = [reply.message.number for reply in await asyncio.gather(*asked)]
        assert numbers == [number + 1 for number in range(40) for _ in range(2)]
        for task in answering:
            task.cancel()


@pytest.mark.parametrize("junk", [b"no frame at all", b"NDIF\x09\x00\x00\x00\x00\x00\x00\x00"])
async def test_what_is_no_frame_ends_the_link(junk: bytes) -> None:
    one, other = socket.socketpair()
    link = await _link(one)
    _, writer = await asyncio.open_unix_connection(sock=other)
    writer.write(junk)

    async with asyncio.timeout(5):
        with pytest.raises(LinkClosed, match="can't be understood"):
            await link.receive()
    await link.close()
    writer.close()
