"""Every exception of the client, in one tree.

    NdifError
    |-- GraphError                the graph can never run as written
    |   |-- OrderError            a value is used where the model has not made it yet
    |   |-- UnknownNameError      no such module, operation or saved name (also an AttributeError)
    |   |-- ValueUnknownError     Python asked for a number that exists only on the server
    |   `-- ClosedTraceError      a value is used outside of its own trace
    |-- ExecutionError            an operation of the graph failed while it ran
    |-- LimitError                larger than the server, or the wire, admits
    |-- BusyError                 the queue is full; `retry_after` says when to come back
    |-- UnavailableError          the model died, is loading, or the server is draining
    |-- TraceCancelledError       somebody cancelled the request
    |-- AuthError                 no API key, or one that this server does not know
    |-- ProtocolError             the two sides do not understand each other
    |-- InternalServerError       a mistake of the server's
    |-- ConnectError              the server can't be reached
    |-- ServerStartError          the private server of `connect("local:...")` did not start
    |-- NoValueError              a value is asked for that was not saved, or not computed
    |-- TensorFileError           a file of tensors can't be read or written
    `-- BlockingCallError         the blocking form was called where `await` is needed

Those that answer for a line of the user's end with that line; `fault` has it as data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ndif_client.sources import capture
from ndif_client.wire.graph import Source
from ndif_client.wire.messages import Fault

if TYPE_CHECKING:
    from ndif_client.results import Result


class NdifError(Exception):
    """The base of all of them.

    Attributes:
        message: what happened, where, and what to do.
        fault: the same as data, where the server or the recorder found the fault.
        status: the HTTP status it came with, if it was the answer to a whole call.
        result: what a trace had saved before it failed, if anything.
    """

    status: int | None = None
    result: Result | None = None

    def __init__(self, message: str, fault: Fault | None = None) -> None:
        super().__init__(message, fault)
        self.message = message
        self.fault = fault

    def __str__(self) -> str:
        return self.message


class GraphError(NdifError):
    """The graph can never run as written; nothing has run."""


class OrderError(GraphError):
    """A value is used at a hook point that the model reaches before the value exists."""


class UnknownNameError(GraphError, AttributeError):
    """There is no module, parameter, operation or saved value of that name."""


class ValueUnknownError(GraphError, AttributeError, TypeError):
    """Python asked for a number, a truth or a size that exists only on the server."""


class ClosedTraceError(GraphError):
    """A value is used outside of the trace it belongs to, or no trace is open."""


class ExecutionError(NdifError):
    """An operation of the graph failed while it ran."""


class LimitError(NdifError):
    """The request is larger than the server, or the wire, admits."""


class BusyError(NdifError):
    """The queue is full."""

    @property
    def retry_after(self) -> float | None:
        """Seconds after which the server expects to have room."""
        return self.fault.retry_after if self.fault is not None else None


class UnavailableError(NdifError):
    """The model died while the request was there, is loading, or the server is draining."""


class TraceCancelledError(NdifError):
    """The request was cancelled."""


class AuthError(NdifError):
    """The server wants an API key, or does not know this one."""


class ProtocolError(NdifError):
    """The two sides do not understand each other: versions differ, or this is no ndif-actor."""


class InternalServerError(NdifError):
    """The server made a mistake; its log says which."""


class ConnectError(NdifError):
    """The server can't be reached."""

    #: whether it is known to have ended, so that asking again is in vain
    for_good: bool = False


class ServerStartError(NdifError):
    """The private server of `connect("local:...")` did not start."""


class NoValueError(NdifError):
    """A value is asked for that was not saved, or has not been computed."""


class TensorFileError(NdifError):
    """A file of tensors can't be read, or something can't be written to one."""


class BlockingCallError(NdifError):
    """The blocking form was called inside a running event loop."""


_OF_KIND: dict[str, type[NdifError]] = {
    "graph": GraphError,
    "execution": ExecutionError,
    "limit": LimitError,
    "busy": BusyError,
    "unavailable": UnavailableError,
    "cancelled": TraceCancelledError,
    "auth": AuthError,
    "protocol": ProtocolError,
    "internal": InternalServerError,
}


def from_fault(fault: Fault) -> NdifError:
    """Return the exception for what the server reports, with the user's lines at its end."""
    kind = _OF_KIND[fault.kind]
    if kind is GraphError and fault.other_source is not None:
        kind = OrderError
    return kind(_with_lines(fault), fault)


def graph_error(
    message: str,
    kind: type[GraphError] = GraphError,
    *,
    source: Source | None = None,
    other: Source | None = None,
    hook: str | None = None,
) -> GraphError:
    """Return the error for a mistake found while recording.

    Args:
        message: what is wrong and what to do.
        kind: the class to raise.
        source: the line at fault; the user's current one by default.
        other: a second line that it conflicts with.
        hook: the hook point that is meant, if one is.
    """
    fault = Fault(
        kind="graph",
        message=message,
        hook=hook,
        source=source or capture(),
        other_source=other,
    )
    return kind(_with_lines(fault), fault)


def _with_lines(fault: Fault) -> str:
    lines = [fault.message]
    if fault.source is not None:
        lines.append(f"  at {fault.source}")
    if fault.other_source is not None:
        lines.append(f"  and {fault.other_source}")
    return "\n".join(lines)
