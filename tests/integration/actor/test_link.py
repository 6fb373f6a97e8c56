"""Links between real processes over real sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from ndif_actor.actor import link as link_module
from ndif_actor.actor.handshake import Address, Refused, connect, serve
from ndif_actor.actor.link import Link, LinkClosed
from ndif_client.wire.frames import FrameLimits
from tests.integration.actor.echo import SECRET, Call

PEER = [sys.executable, "-m", "tests.integration.actor.echo"]
ROOT = Path(__file__).parents[3]


class Peer:
    """A process that serves echoes, and where."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self.address = Address.parse(process.stdout.readline().strip())


@pytest.fixture(params=["unix", "tcp"])
async def peer(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Peer]:
    address = f"unix://{tmp_path}/s" if request.param == "unix" else "tcp://127.0.0.1:0"
    process = subprocess.Popen(
        [*PEER, address],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}"},
    )
    yield Peer(process)
    process.kill()
    process.communicate()


async def _connected(peer: Peer) -> Link[Call]:
    return await connect(peer.address, SECRET, Call)


async def test_an_ask_is_answered_with_its_own_buffers(peer: Peer) -> None:
    link = await _connected(peer)
    sent = [os.urandom(n) for n in (0, 1, 1000, 300_000)]

    reply = await link.ask(Call("echo", 7), sent, timeout_s=10)

    assert reply.message == Call("echo", 8)
    assert [bytes(buffer) for buffer in reply.buffers] == sent
    await link.close()


async def test_concurrent_asks_get_their_own_answers(peer: Peer) -> None:
    link = await _connected(peer)

    replies = await asyncio.gather(*(link.ask(Call("echo", n), timeout_s=10) for n in range(50)))

    assert [reply.message.number for reply in replies] == list(range(1, 51))
    await link.close()


async def test_an_ask_without_an_answer_meets_its_deadline_and_the_link_goes_on(peer: Peer) -> None:
    link = await _connected(peer)

    with pytest.raises(TimeoutError):
        await link.ask(Call("ignore", 0), timeout_s=0.1)

    assert (await link.ask(Call("echo", 1), timeout_s=10)).message.number == 2
    await link.close()


async def test_a_large_buffer_of_the_same_host_does_not_cross_the_socket(peer: Peer) -> None:
    link = await _connected(peer)
    before = link.statistics().received_bytes

    reply = await link.ask(Call("allocate", 64 << 20), timeout_s=10)

    assert reply.buffers[0].nbytes == 64 << 20
    assert bytes(reply.buffers[0][:8]) == b"allotted"
    assert link.statistics().received_bytes - before < 10_000
    reply.release()
    await link.close()


async def test_shared_memory_is_used_again_after_its_release(peer: Peer) -> None:
    link = await _connected(peer)
    for _ in range(20):
        reply = await link.ask(Call("allocate", 8 << 20), timeout_s=10)
        reply.release()
    reply = await link.ask(Call("count_descriptors", 0), timeout_s=10)
    few = reply.message.number

    assert few < 40
    await link.close()


async def test_a_killed_peer_is_noticed_at_once(peer: Peer) -> None:
    link = await _connected(peer)
    asked = asyncio.ensure_future(link.ask(Call("ignore", 0), timeout_s=30))
    await asyncio.sleep(0.05)
    peer.process.send_signal(signal.SIGKILL)

    async with asyncio.timeout(2):
        with pytest.raises(LinkClosed):
            await link.receive()
        with pytest.raises(LinkClosed):
            await asked
    with pytest.raises(LinkClosed):
        await link.send(Call("echo", 1))
    await link.close()


async def test_a_stopped_peer_is_dead_after_the_silence(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "HEARTBEAT_S", 0.1)
    link = await connect(peer.address, SECRET, Call, silence_s=1.5)
    peer.process.send_signal(signal.SIGSTOP)

    async with asyncio.timeout(6):
        with pytest.raises(LinkClosed, match="no sign of life"):
            await link.receive()
    await link.close()


async def test_a_wrong_secret_is_refused(peer: Peer) -> None:
    with pytest.raises(Refused, match="secret"):
        await connect(peer.address, b"guessed", Call)

    link = await _connected(peer)
    assert (await link.ask(Call("echo", 1), timeout_s=10)).message.number == 2
    await link.close()


async def test_a_stranger_who_sends_garbage_disturbs_nobody(peer: Peer) -> None:
    family = socket.AF_UNIX if peer.address.path else socket.AF_INET
    with socket.socket(family) as stranger:
        stranger.connect(peer.address.path or (peer.address.host, peer.address.port))
        stranger.sendall(os.urandom(4096))

    link = await _connected(peer)
    assert (await link.ask(Call("echo", 1), timeout_s=10)).message.number == 2
    await link.close()


async def test_a_frame_over_the_limit_ends_the_link_before_it_is_read(peer: Peer) -> None:
    tight = FrameLimits(max_buffer_bytes=1000, max_total_bytes=100_000)
    link = await connect(peer.address, SECRET, Call, limits=tight)

    with pytest.raises(LinkClosed, match="limit is 1000"):
        await link.ask(Call("echo", 1), [bytes(2000)], timeout_s=10)
    await link.close()


async def test_a_message_of_an_unknown_kind_ends_the_link(tmp_path: Path) -> None:
    class Other(msgspec.Struct, tag="other"):
        text: str

    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def on_link(link: Link[Call]) -> None:
        try:
            await link.receive()
        except LinkClosed as error:
            ended.set_result(str(error))
        await link.close()

    server, address = await serve(Address(path=f"{tmp_path}/s"), SECRET, Call, on_link)
    link = await connect(address, SECRET, Call)
    await link.send(Other("?"))

    assert "can't be understood" in await asyncio.wait_for(ended, 5)
    await link.close()
    server.close()


async def test_closed_links_leave_no_descriptors_behind(peer: Peer) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        link = await _connected(peer)
        reply = await link.ask(Call("allocate", 1 << 20), timeout_s=10)
        reply.release()
        await link.close()
    await asyncio.sleep(0.05)

    assert len(os.listdir("/proc/self/fd")) <= before + 1
