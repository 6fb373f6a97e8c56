"""Several requests in one frame: their constants' buffers numbered anew, every bound kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from ndif_client.wire.frames import Buffer, FrameLimits, encode_frame
from ndif_client.wire.graph import Constant, Node
from ndif_client.wire.messages import MAX_REQUESTS, PROTOCOL, TraceRequest

#: Bytes of constants that several requests may bring into one frame.
_MAX_SHARED_BYTES = 64 << 20

_LIMITS = FrameLimits()

_encoder = msgspec.msgpack.Encoder()


class Encoded:
    """A request ready to be put into a frame.

    Raises:
        UnicodeEncodeError: a text in it has lone surrogates.
    """

    def __init__(self, request: TraceRequest, buffers: Sequence[bytes]) -> None:
        self.request = request
        self.buffers = buffers
        self._header = _encoder.encode(request)

    def header(self, offset: int) -> bytes:
        """Return its message, with its constants' buffers numbered from `offset`."""
        if offset == 0 or not self.buffers:
            return self._header
        return _encoder.encode(_with_offset(self.request, offset))


class _Batch:
    """A frame while requests are added to it."""

    def __init__(self) -> None:
        self.encoded: list[msgspec.Raw] = []
        self.buffers: list[bytes] = []
        self._header_bytes = 0
        self._buffer_bytes = 0

    def add(self, request: Encoded) -> bool:
        """Add a request; False if it needs another frame."""
        header = request.header(len(self.buffers))
        header_bytes = self._header_bytes + len(header)
        buffer_bytes = self._buffer_bytes + sum(map(len, request.buffers))
        full = (
            len(self.encoded) >= MAX_REQUESTS
            or len(self.buffers) + len(request.buffers) > _LIMITS.max_buffers
            # Half of it: the other side may want room for its own.
            or header_bytes > _LIMITS.max_header_bytes // 2
            or buffer_bytes > _MAX_SHARED_BYTES
        )
        if full and self.encoded:
            return False
        self.encoded.append(msgspec.Raw(header))
        self.buffers.extend(request.buffers)
        self._header_bytes, self._buffer_bytes = header_bytes, buffer_bytes
        return True

    def frame(self) -> list[Buffer]:
        """Return the pieces of the frame, whose header is a `Submission`."""
        header = _encoder.encode({"requests": self.encoded, "protocol": PROTOCOL})
        return encode_frame(header, self.buffers)


def frames_of(requests: Sequence[Encoded]) -> Iterator[tuple[int, list[Buffer]]]:
    """Yield frames that carry all requests in order, each with how many are in it."""
    batch = _Batch()
    for request in requests:
        if not batch.add(request):
            yield len(batch.encoded), batch.frame()
            batch = _Batch()
            batch.add(request)
    if batch.encoded:
        yield len(batch.encoded), batch.frame()


def _with_offset(request: TraceRequest, offset: int) -> TraceRequest:
    """Let the constants of a request point to buffers that start at `offset`."""
    nodes: list[Node] = [
        Constant(msgspec.structs.replace(n.tensor, buffer=n.tensor.buffer + offset))
        if isinstance(n, Constant)
        else n
        for n in request.graph.nodes
    ]
    graph = msgspec.structs.replace(request.graph, nodes=nodes)
    return msgspec.structs.replace(request, graph=graph)
