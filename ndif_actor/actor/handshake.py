"""How two processes come to trust each other before a message is decoded, and find each other.

    both:  magic, version, 32 random bytes
    both:  HMAC-SHA256(secret, role, own random bytes, the peer's random bytes)
    both:  who I am (host, namespace, user, pid), authenticated by coming after

The secret is made anew for every run and never sent.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from ndif_actor.actor.channel import ByteChannel
from ndif_actor.actor.link import SILENCE_S, Link, LinkClosed
from ndif_actor.actor.slabs import HostIdentity
from ndif_client.wire.frames import FrameError, FrameLimits, encode_frame, read_frame

_MAGIC = b"NDIFLINK\x01"
_NONCE_BYTES = 32

#: Seconds a stranger has to prove himself.
HANDSHAKE_S = 10.0

_INTRODUCTION = FrameLimits(
    max_header_bytes=4096, max_buffers=0, max_buffer_bytes=0, max_total_bytes=4096
)

Role = Literal[b"connects", b"serves"]


class Refused(ConnectionError):
    """The other side does not know the secret, or speaks something else."""


class Address(msgspec.Struct, frozen=True):
    """Where links are served: a host and port, or the path of a unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read "tcp://HOST:PORT" or "unix:///PATH".

        Raises:
            ValueError: it is neither.
        """
        parts = urlsplit(text)
        if parts.scheme == "unix" and parts.path:
            return cls(path=parts.path)
        if parts.scheme == "tcp" and parts.hostname and parts.port is not None:
            return cls(host=parts.hostname, port=parts.port)
        raise ValueError(f"{text!r} is no address; give tcp://HOST:PORT or unix:///PATH")

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"


async def connect(
    address: Address,
    secret: bytes,
    accepts: Any,
    *,
    limits: FrameLimits | None = None,
    silence_s: float = SILENCE_S,
) -> Link[Any]:
    """Open a link.

    Args:
        address: where the other side serves.
        secret: of this run.
        accepts: the union of message types to be received.
        limits: what a frame may hold.
        silence_s: seconds without a sign of life after which the link ends.

    Raises:
        OSError: nobody answers there.
        Refused: the other side does not know the secret.
    """
    loop = asyncio.get_running_loop()
    if address.path:
        _, channel = await loop.create_unix_connection(ByteChannel, address.path)
    else:
        _, channel = await loop.create_connection(ByteChannel, address.host, address.port)
    return await _shake_hands(
        channel, secret, b"connects", accepts, limits or FrameLimits(), silence_s
    )


async def serve(
    address: Address,
    secret: bytes,
    accepts: Any,
    on_link: Callable[[Link[Any]], Awaitable[None]],
    *,
    limits: FrameLimits | None = None,
    silence_s: float = SILENCE_S,
) -> tuple[asyncio.Server, Address]:
    """Accept links until the server is closed; return it and where it really listens.

    `on_link` runs as a task for each link; strangers never get that far.
    """
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def welcome(channel: ByteChannel) -> None:
        try:
            link = await _shake_hands(
                channel, secret, b"serves", accepts, limits or FrameLimits(), silence_s
            )
        except (ConnectionError, EOFError):
            return
        await on_link(link)

    def factory() -> ByteChannel:
        return _Welcomed(welcome, tasks)

    if address.path:
        server = await loop.create_unix_server(factory, address.path)
        os.chmod(address.path, 0o600)
        return server, address
    server = await loop.create_server(factory, address.host, address.port)
    port = server.sockets[0].getsockname()[1]
    return server, Address(host=address.host, port=port)


class _Welcomed(ByteChannel):
    """A channel whose connection starts a handshake."""

    def __init__(
        self,
        welcome: Callable[[ByteChannel], Awaitable[None]],
        tasks: set[asyncio.Task[None]],
    ) -> None:
        super().__init__()
        self._welcome = welcome
        self._tasks = tasks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        task = asyncio.ensure_future(self._welcome(self))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _shake_hands(
    channel: ByteChannel,
    secret: bytes,
    role: Role,
    accepts: Any,
    limits: FrameLimits,
    silence_s: float,
) -> Link[Any]:
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            await _prove(channel, secret, role)
            peer = await _introduce(channel)
    except (EOFError, TimeoutError, FrameError, msgspec.DecodeError) as error:
        channel.abort("the handshake failed")
        raise Refused(f"the handshake failed: {error or 'timed out'}") from None
    except Refused as error:
        channel.abort(str(error))
        raise
    return Link(channel, peer, accepts, limits, silence_s)


async def _prove(channel: ByteChannel, secret: bytes, role: Role) -> None:
    mine = secrets.token_bytes(_NONCE_BYTES)
    await channel.write([_MAGIC + mine])
    greeting = await _read(channel, len(_MAGIC) + _NONCE_BYTES)
    if greeting[: len(_MAGIC)] != _MAGIC:
        raise Refused("the other side is no ndif-actor of this version")
    theirs = greeting[len(_MAGIC) :]
    other: Role = b"serves" if role == b"connects" else b"connects"
    await channel.write([_proof(secret, role, mine, theirs)])
    proof = await _read(channel, 32)
    if not hmac.compare_digest(proof, _proof(secret, other, theirs, mine)):
        raise Refused("the other side does not know this run's secret")


def _proof(secret: bytes, role: Role, own: bytes, others: bytes) -> bytes:
    return hmac.digest(secret, role + own + others, "sha256")


async def _introduce(channel: ByteChannel) -> HostIdentity:
    mine = HostIdentity.of_this_process()
    await channel.write(encode_frame(msgspec.msgpack.encode(mine)))
    frame = await read_frame(channel, _INTRODUCTION)
    return msgspec.msgpack.decode(frame.header, type=HostIdentity)


async def _read(channel: ByteChannel, nbytes: int) -> bytes:
    data = bytearray(nbytes)
    await channel.read_into(memoryview(data))
    return bytes(data)


def is_local(host: str) -> bool:
    """Whether a host name means this machine only."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(str(entry[4][0]).startswith(("127.", "::1")) for entry in found)


__all__ = ["Address", "LinkClosed", "Refused", "connect", "is_local", "serve"]
