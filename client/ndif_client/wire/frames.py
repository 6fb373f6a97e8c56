"""One framing for HTTP bodies and actor links: a msgpack header, then raw buffers out of band.

    offset  size   field
    0       4      magic, b"NDIF"
    4       1      version of this framing
    5       1      reserved, zero
    6       2      number of buffers (little-endian, like every integer here)
    8       4      header length in bytes
    12      8 * n  length of each buffer in bytes
    ...            header (msgpack), then the buffers, back to back

Every length is checked against `FrameLimits` before a byte of what it announces is read or
allocated. Buffers are never copied into the header, so a tensor travels as it lies in memory.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol

import msgspec

MAGIC = b"NDIF"
VERSION = 1

_PRELUDE = struct.Struct("<4sBBHI")
PRELUDE_BYTES = _PRELUDE.size

_HINT = "is the other side an ndif-actor of the same version?"

Buffer = bytes | bytearray | memoryview


class FrameError(ValueError):
    """The bytes are not a frame of this version, or the frame exceeds a limit."""


class FrameLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a reader is willing to receive; everything beyond is refused unread."""

    max_header_bytes: int = 16 << 20
    max_buffers: int = 0xFFFF
    max_buffer_bytes: int = 4 << 30
    max_total_bytes: int = 16 << 30


class Prelude(msgspec.Struct, frozen=True):
    """The fixed first bytes of a frame: how many buffers follow and how long the header is."""

    num_buffers: int
    header_bytes: int

    @property
    def table_bytes(self) -> int:
        return 8 * self.num_buffers


class Frame(msgspec.Struct, frozen=True):
    """A received frame: the undecoded header and the buffers it refers to by position."""

    header: Buffer
    buffers: list[memoryview]


class ByteSource(Protocol):
    """What `read_frame` reads from: a socket, an HTTP body, a test's byte string."""

    async def read_into(self, target: memoryview) -> None:
        """Fill `target` completely, or raise `EOFError`."""
        ...


def encode_frame(header: bytes, buffers: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return the pieces of one frame, in order, ready for a gathering write.

    The buffers are passed through, not copied.

    Raises:
        FrameError: more buffers than the format can number.
    """
    if len(buffers) > 0xFFFF:
        raise FrameError(f"a frame carries at most 65535 buffers, not {len(buffers)}")
    if not buffers:
        return [_PRELUDE.pack(MAGIC, VERSION, 0, 0, len(header)) + header]
    views = [memoryview(b).cast("B") for b in buffers]
    prelude = _PRELUDE.pack(MAGIC, VERSION, 0, len(views), len(header))
    table = struct.pack(f"<{len(views)}Q", *(v.nbytes for v in views))
    return [prelude + table + header, *views]


def frame_bytes(pieces: Sequence[Buffer]) -> int:
    """Total length in bytes of an encoded frame (for a Content-Length header)."""
    return sum(memoryview(p).nbytes for p in pieces)


def decode_prelude(data: Buffer, limits: FrameLimits) -> Prelude:
    """Check the first `PRELUDE_BYTES` bytes and return what they announce.

    Raises:
        FrameError: wrong magic or version, or more than `limits` allows.
    """
    magic, version, _, num_buffers, header_bytes = _PRELUDE.unpack(data)
    if magic != MAGIC:
        raise FrameError(f"not an NDIF frame (starts with {bytes(magic)!r}); {_HINT}")
    if version != VERSION:
        raise FrameError(f"frame version {version}, this side speaks {VERSION}; {_HINT}")
    if header_bytes > limits.max_header_bytes:
        raise FrameError(f"header of {header_bytes} bytes, the limit is {limits.max_header_bytes}")
    if num_buffers > limits.max_buffers:
        raise FrameError(f"{num_buffers} buffers in one frame, the limit is {limits.max_buffers}")
    return Prelude(num_buffers, header_bytes)


def decode_table(prelude: Prelude, data: Buffer, limits: FrameLimits) -> tuple[int, ...]:
    """Check the buffer lengths and return them.

    Raises:
        FrameError: one buffer or all together exceed `limits`.
    """
    sizes: tuple[int, ...] = struct.unpack(f"<{prelude.num_buffers}Q", data)
    for index, size in enumerate(sizes):
        if size > limits.max_buffer_bytes:
            raise FrameError(
                f"buffer {index} has {size} bytes, the limit is {limits.max_buffer_bytes}"
            )
    total = prelude.header_bytes + sum(sizes)
    if total > limits.max_total_bytes:
        raise FrameError(f"frame of {total} bytes, the limit is {limits.max_total_bytes}")
    return sizes


async def read_frame(source: ByteSource, limits: FrameLimits) -> Frame:
    """Read one frame; each buffer lands in memory allocated once at its final size.

    Raises:
        EOFError: the source ended; `EOFError.args == ("clean",)` when it ended between frames.
        FrameError: the frame is malformed or exceeds `limits`.
    """
    head = bytearray(PRELUDE_BYTES)
    await source.read_into(memoryview(head))
    prelude = decode_prelude(head, limits)
    rest = memoryview(bytearray(prelude.table_bytes + prelude.header_bytes))
    if rest:
        await source.read_into(rest)
    sizes = decode_table(prelude, rest[: prelude.table_bytes], limits)
    header = rest[prelude.table_bytes :]
    buffers = []
    for size in sizes:
        buffer = memoryview(bytearray(size))
        if size:
            await source.read_into(buffer)
        buffers.append(buffer)
    return Frame(header, buffers)


def whole_frame(data: memoryview, limits: FrameLimits) -> tuple[Frame, int] | None:
    """Copy the frame that lies at the beginning of `data`, if it is there to its end.

    Returns:
        The frame and its length in bytes; None if more of it is to come.

    Raises:
        FrameError: the frame is malformed or exceeds `limits`.
    """
    if data.nbytes < PRELUDE_BYTES:
        return None
    prelude = decode_prelude(data[:PRELUDE_BYTES], limits)
    end = PRELUDE_BYTES + prelude.table_bytes + prelude.header_bytes
    if data.nbytes < end:
        return None
    header = PRELUDE_BYTES + prelude.table_bytes
    sizes = decode_table(prelude, data[PRELUDE_BYTES:header], limits)
    position, end = end, end + sum(sizes)
    if data.nbytes < end:
        return None
    own = memoryview(bytearray(data[:end]))
    buffers = []
    for size in sizes:
        buffers.append(own[position : position + size])
        position += size
    return Frame(own[header : header + prelude.header_bytes], buffers), end


def split_frame(data: Buffer, limits: FrameLimits) -> Frame:
    """Decode a frame that is already whole in memory, without copying its buffers.

    Raises:
        FrameError: the frame is malformed, cut short, too long, or exceeds `limits`.
    """
    view = memoryview(data).cast("B")
    if view.nbytes < PRELUDE_BYTES:
        raise FrameError(f"{view.nbytes} bytes are too few for a frame")
    prelude = decode_prelude(view[:PRELUDE_BYTES], limits)
    position = PRELUDE_BYTES + prelude.table_bytes
    if view.nbytes < position:
        raise FrameError("the frame is cut short in its buffer table")
    sizes = decode_table(prelude, view[PRELUDE_BYTES:position], limits)
    if view.nbytes != position + prelude.header_bytes + sum(sizes):
        raise FrameError(
            f"the frame announces {position + prelude.header_bytes + sum(sizes)} bytes "
            f"and has {view.nbytes}"
        )
    header = view[position : position + prelude.header_bytes]
    position += prelude.header_bytes
    buffers = []
    for size in sizes:
        buffers.append(view[position : position + size])
        position += size
    return Frame(header, buffers)
