"""Frames come out as they went in, however they arrive, and nothing else is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndif_client.wire.frames import (
    PRELUDE_BYTES,
    FrameError,
    FrameLimits,
    encode_frame,
    frame_bytes,
    read_frame,
    split_frame,
    whole_frame,
)

LIMITS = FrameLimits(max_header_bytes=64, max_buffers=4, max_buffer_bytes=64, max_total_bytes=200)

headers = st.binary(max_size=40)
buffers = st.lists(st.binary(max_size=40), max_size=3)


class Bytes:
    """A source of the bytes that it is given."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read_into(self, target: memoryview) -> None:
        if len(self._data) < target.nbytes:
            raise EOFError
        target[:] = self._data[: target.nbytes]
        self._data = self._data[target.nbytes :]


def joined(header: bytes, buffers: list[bytes]) -> bytes:
    pieces = encode_frame(header, buffers)
    data = b"".join(pieces)
    assert frame_bytes(pieces) == len(data)
    return data


@given(headers, buffers, st.binary(max_size=30))
async def test_a_frame_is_read_as_it_was_written(
    header: bytes, buffers: list[bytes], after: bytes
) -> None:
    data = joined(header, buffers)
    found = whole_frame(memoryview(data + after), LIMITS)
    assert found is not None

    for frame in (await read_frame(Bytes(data), LIMITS), split_frame(data, LIMITS), found[0]):
        assert bytes(frame.header) == header
        assert [bytes(buffer) for buffer in frame.buffers] == buffers
    assert found[1] == len(data)


@given(headers, buffers, st.data())
def test_a_part_of_a_frame_is_none(
    header: bytes, buffers: list[bytes], data: st.DataObject
) -> None:
    whole = joined(header, buffers)
    part = whole[: data.draw(st.integers(0, len(whole) - 1))]

    assert whole_frame(memoryview(part), LIMITS) is None


@given(st.binary(max_size=80))
def test_anything_else_is_refused_or_waited_for(data: bytes) -> None:
    try:
        found = whole_frame(memoryview(data), LIMITS)
    except FrameError:
        return
    assert found is None or data.startswith(b"NDIF")


@pytest.mark.parametrize(
    ("header", "buffers", "message"),
    [
        (bytes(65), [], "header of 65 bytes"),
        (b"", [bytes(65)], "buffer 0 has 65 bytes"),
        (b"", [b""] * 5, "5 buffers in one frame"),
        (bytes(60), [bytes(60)] * 3, "frame of 240 bytes"),
    ],
)
def test_what_exceeds_a_limit_is_refused_before_it_is_whole(
    header: bytes, buffers: list[bytes], message: str
) -> None:
    data = joined(header, buffers)
    announced = PRELUDE_BYTES + 8 * len(buffers) + len(header)

    with pytest.raises(FrameError, match=message):
        whole_frame(memoryview(data[:announced]), LIMITS)
