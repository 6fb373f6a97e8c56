"""What is checked about a graph before the engine looks at it, and which bytes are its own."""

from __future__ import annotations

from typing import Literal

from msgspec.structs import replace

from ndif_actor.errors import RequestError
from ndif_client.wire.graph import (
    Apply,
    Argument,
    CallModule,
    Constant,
    Graph,
    Items,
    Save,
    WriteGradient,
    WriteHook,
)
from ndif_client.wire.messages import PROTOCOL, Fault, Submission
from ndif_client.wire.tensors import check_buffer

#: Lists within lists that an argument of a node may have. What could be decoded here must also
#: be decoded by the shards, wherever their stacks stand.
MAX_NESTING = 16

#: Values one request may save at a step.
MAX_SAVES = 4096


def refused(kind: Literal["graph", "limit", "protocol"], message: str) -> RequestError:
    """Return the error that refuses a request."""
    return RequestError(Fault(kind=kind, message=message))


def check_protocol(submission: Submission) -> None:
    """Refuse another version of the messages.

    Raises:
        RequestError: the client speaks another one.
    """
    if submission.protocol != PROTOCOL:
        raise refused(
            "protocol",
            f"the client speaks version {submission.protocol} of the protocol, this server "
            f"{PROTOCOL}: install the same ndif-actor version on both sides",
        )


def screen(graph: Graph) -> int:
    """Check the outer form of a graph; return how many values it saves.

    Raises:
        RequestError: it saves too many, or an argument is nested too deeply.
    """
    num_saves = 0
    for number, node in enumerate(graph.nodes):
        match node:
            case Apply(args=args, kwargs=kwargs) | CallModule(args=args, kwargs=kwargs):
                arguments: tuple[Argument, ...] = (*args, *kwargs.values())
            case WriteHook(value=value) | WriteGradient(value=value):
                arguments = (value,)
            case Save():
                num_saves += 1
                continue
            case _:
                continue
        if any(_nesting(argument) > MAX_NESTING for argument in arguments):
            message = f"an argument has lists within lists, more than {MAX_NESTING} levels of them"
            source = graph.source_of(number)
            raise RequestError(Fault(kind="limit", message=message, node=number, source=source))
    if num_saves > MAX_SAVES:
        raise refused("limit", f"{num_saves} saved values; one request may have {MAX_SAVES}")
    return num_saves


def _nesting(argument: Argument) -> int:
    if not isinstance(argument, Items):
        return 0
    return 1 + max(map(_nesting, argument.values), default=0)


def own_buffers(graph: Graph, buffers: list[memoryview]) -> tuple[Graph, list[memoryview]]:
    """Renumber the constants of one request to the buffers that it alone refers to.

    Raises:
        RequestError: a constant has no buffer, or one of another length.
    """
    own: list[memoryview] = []
    moved: dict[int, int] = {}  # a buffer that several constants share is sent once
    nodes = None
    for number, node in enumerate(graph.nodes):
        if not isinstance(node, Constant):
            continue
        try:
            buffer = check_buffer(node.tensor, buffers)
        except ValueError as error:
            source = graph.source_of(number)
            fault = Fault(kind="graph", message=str(error), node=number, source=source)
            raise RequestError(fault) from None
        nodes = list(graph.nodes) if nodes is None else nodes
        if node.tensor.buffer not in moved:
            moved[node.tensor.buffer] = len(own)
            own.append(buffer)
        nodes[number] = moved_constant(node, moved[node.tensor.buffer])
    return (graph if nodes is None else replace(graph, nodes=nodes)), own


def moved_constant(node: Constant, buffer: int) -> Constant:
    """Return `node` with its bytes in another buffer."""
    return Constant(replace(node.tensor, buffer=buffer))
