"""Requests that travel together keep their own constants, and every bound of the wire."""

from __future__ import annotations

import msgspec
import pytest

from ndif_client.batching import Encoded, frames_of
from ndif_client.wire.frames import FrameLimits, split_frame
from ndif_client.wire.graph import Constant, Graph, Invoke, Ref, Save
from ndif_client.wire.messages import MAX_REQUESTS, Submission, TraceRequest
from ndif_client.wire.tensors import TensorSpec, check_buffer


def _request(number: int, constants: int, nbytes: int = 4) -> Encoded:
    nodes = [
        node
        for index in range(constants)
        for node in (Constant(TensorSpec("uint8", (nbytes,), index)), Save(Ref(2 * index)))
    ]
    buffers = [bytes([number % 256]) * nbytes for _ in range(constants)]
    request = TraceRequest(
        id=f"{number:032}", model="", invokes=[Invoke(["x"])], graph=Graph(list(nodes))
    )
    return Encoded(request, buffers)


def _received(requests: list[Encoded]) -> list[list[tuple[int, list[int]]]]:
    """Return, per frame, each request's number and the first byte of each of its constants."""
    frames = []
    for count, pieces in frames_of(requests):
        frame = split_frame(b"".join(pieces), FrameLimits())
        submission = msgspec.msgpack.decode(frame.header, type=Submission)
        assert len(submission.requests) == count
        frames.append(
            [
                (
                    int(request.id),
                    [
                        check_buffer(node.tensor, frame.buffers)[0]
                        for node in request.graph.nodes
                        if isinstance(node, Constant)
                    ],
                )
                for request in submission.requests
            ]
        )
    return frames


def test_each_request_finds_its_own_constants() -> None:
    requests = [_request(1, 2), _request(2, 0), _request(3, 1)]

    assert _received(requests) == [[(1, [1, 1]), (2, []), (3, [3])]]


@pytest.mark.parametrize(
    "requests",
    [
        [_request(n, 0) for n in range(MAX_REQUESTS + 3)],
        [_request(n, 9000) for n in range(8)],
        [_request(n, 1, 30 << 20) for n in range(4)],
    ],
    ids=["requests", "buffers", "bytes"],
)
def test_what_is_too_much_for_one_frame_goes_out_in_several(requests: list[Encoded]) -> None:
    frames = _received(requests)

    assert len(frames) == 2
    assert [number for frame in frames for number, _ in frame] == list(range(len(requests)))


def test_a_request_too_large_to_share_goes_out_alone() -> None:
    frames = _received([_request(1, 1, 100 << 20), _request(2, 1)])

    assert [[number for number, _ in frame] for frame in frames] == [[1], [2]]
