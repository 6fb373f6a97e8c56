"""What the requests of a submission may count on: held values, and requests that come before.

It is made on the event loop and goes with the submission to where that is checked, request by
request, in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from msgspec.structs import replace

from ndif_actor.coordinator.held import Known
from ndif_actor.coordinator.screening import refused
from ndif_actor.errors import RequestError
from ndif_client.wire.graph import Graph, Held, Keep
from ndif_client.wire.messages import Fault, HeldSpec, TraceRequest

#: Names that a request may keep, together with the unfinished ones that it comes after.
MAX_KEPT = 1024

#: Names that an error lists.
_SHOWN = 10


class Cause(NamedTuple):
    """A request that has failed, and why."""

    request: str
    fault: Fault


def after_failure(cause: Cause) -> Fault:
    """Return why a request does not run that comes after one that has failed."""
    message = (
        f"it comes after request {cause.request}, which has failed, so it has not run: "
        f"{cause.fault.message}"
    )
    return replace(cause.fault, message=message, node=None)


class Outlook:
    """What is known before a submission is checked, and what its requests add to that.

    Args:
        sessions: what each session holds.
        keeps: what unfinished requests will keep, and those that they come after.
        failed: those that have failed already.
    """

    def __init__(
        self,
        sessions: Mapping[str, Known] | None = None,
        keeps: Mapping[str, Mapping[str, HeldSpec]] | None = None,
        failed: Mapping[str, Cause] | None = None,
    ) -> None:
        self._sessions = sessions or {}
        self._keeps = dict(keeps or {})
        self._failed = dict(failed or {})

    def check_after(self, request: TraceRequest) -> None:
        """Refuse a request that comes after one that has failed.

        Raises:
            RequestError: it does.
        """
        for name in request.after:
            if name in self._failed:
                raise RequestError(after_failure(self._failed[name]))

    def held_by(self, request: TraceRequest) -> dict[str, HeldSpec]:
        """Return what each held value is that a request uses.

        Raises:
            RequestError: there is none of that name.
        """
        uses = [(n, node) for n, node in enumerate(request.graph.nodes) if isinstance(node, Held)]
        if not uses:
            return {}
        session = self._session(request)
        before = self.kept_before(request)
        found: dict[str, HeldSpec] = {}
        for number, node in uses:
            spec = before.get(node.name) or session.held.get(node.name)
            if spec is None and node.otherwise is not None:
                continue
            if spec is None:
                raise _unknown(request.graph, number, node.name, {*session.held, *before}, session)
            found[node.name] = spec
        return found

    def kept_before(self, request: TraceRequest) -> Mapping[str, HeldSpec]:
        """Return what the unfinished requests will keep that a request comes after."""
        found = [self._keeps[name] for name in request.after if self._keeps.get(name)]
        if len(found) == 1:
            return found[0]
        return {name: spec for kept in found for name, spec in kept.items()}

    def kept_with(
        self, request: TraceRequest, keeps: Mapping[str, HeldSpec]
    ) -> Mapping[str, HeldSpec]:
        """Return the same with what the request itself keeps.

        Raises:
            RequestError: these are too many names.
        """
        before = self.kept_before(request)
        if all(before.get(name) == spec for name, spec in keeps.items()):
            return before  # as the steps of a training loop do, whose chains may be long
        kept = {**before, **keeps}
        if len(kept) > MAX_KEPT:
            raise refused(
                "limit",
                f"{len(kept)} names are kept by this request and the unfinished ones that it comes "
                f"after, at most {MAX_KEPT} are allowed; stack what you keep, or send it later",
            )
        return kept

    def note_admitted(self, request: str, kept: Mapping[str, HeldSpec]) -> None:
        """Let later requests count on what this one will keep, and those that it comes after."""
        self._keeps[request] = kept

    def note_refused(self, request: TraceRequest, fault: Fault) -> None:
        """Refuse later requests that come after this one."""
        causes = [self._failed[name] for name in request.after if name in self._failed]
        self._failed[request.id] = causes[0] if causes else Cause(request.id, fault)

    def _session(self, request: TraceRequest) -> Known:
        return self._sessions.get(request.session or "", Known())


def check_keeps(request: TraceRequest) -> None:
    """Refuse keeps, and uses of held values, that make no sense.

    Raises:
        RequestError: there is one.
    """
    names: dict[str, int] = {}
    for number, node in enumerate(request.graph.nodes):
        if not isinstance(node, Held | Keep):
            continue
        if request.session is None:
            raise refused("protocol", "held values belong to a session, and this request has none")
        if isinstance(node, Held):
            continue
        if node.name in names:
            raise _fault(
                request.graph,
                number,
                f"{node.name!r} is kept twice by one request; give one of them another name",
                names[node.name],
            )
        names[node.name] = number


def check_prompts(request: TraceRequest) -> None:
    """Refuse a generation without a prompt.

    Raises:
        RequestError: it has none.
    """
    if request.decoding is not None and not request.invokes:
        raise refused("graph", "a generation needs a prompt")


def _unknown(graph: Graph, number: int, name: str, names: set[str], session: Known) -> RequestError:
    if name in session.lost:
        error = _fault(
            graph,
            number,
            f"{name!r} was lost when the model restarted; upload or compute it again",
        )
        return RequestError(replace(error.fault, kind="unavailable"))
    shown = ", ".join(map(repr, sorted(names)[:_SHOWN])) or "nothing"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return _fault(
        graph,
        number,
        f"nothing is held as {name!r} in this session; held are: {shown}{more}. A value is held "
        "when the request that keeps it has ended, until it is dropped or the session is idle for "
        "long",
    )


def _fault(graph: Graph, number: int, message: str, other: int | None = None) -> RequestError:
    return RequestError(
        Fault(
            kind="graph",
            message=message,
            node=number,
            source=graph.source_of(number),
            other_source=None if other is None else graph.source_of(other),
        )
    )
