"""A chain: traces that are sent together and run one after another on the server.

async with session.chain() as chain:
    for batch in batches:
        with chain.trace(batch) as trace:
            ...
            new.keep("weights")     # the next trace finds it: session.held("weights")
# all of them have run
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TypeVar, Unpack

from ndif_client.errors import ClosedTraceError, graph_error
from ndif_client.generation import GenerateOptions, Generation
from ndif_client.prompts import Prompt
from ndif_client.recording import TraceFunction
from ndif_client.results import Result
from ndif_client.trace import Trace, TraceOptions

if TYPE_CHECKING:
    from ndif_client.session import Session

TraceT = TypeVar("TraceT", bound=Trace)


class Chain:
    """Traces in order: each runs when the one before has ended well, and fails when that fails.

    They are sent in one go at the end of the block, and what they keep stays on the server, so none
    waits for a round trip. Made by `session.chain()`.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._traces: list[Trace] = []
        self._state: Literal["new", "open", "ended"] = "new"

    @property
    def traces(self) -> list[Trace]:
        """All of them, in order."""
        return list(self._traces)

    @property
    def results(self) -> list[Result]:
        """What came back for each of them, when the chain has run.

        Raises:
            NoValueError: it has not, or one of them has failed.
        """
        return [trace.result for trace in self._traces]

    def trace(
        self,
        prompt: Prompt | None = None,
        function: TraceFunction | None = None,
        **options: Unpack[TraceOptions],
    ) -> Trace:
        """Add a trace, which a plain `with` records. Arguments are those of `Session.trace`.

        Raises:
            ClosedTraceError: this is not inside of the chain's own block.
        """
        self._check_open()
        return self._add(self._session.trace(prompt, function, **options))

    def generate(
        self,
        prompt: Prompt | None = None,
        function: TraceFunction | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Add a generation. Arguments are those of `Session.generate`; otherwise as `trace`."""
        self._check_open()
        return self._add(self._session.generate(prompt, function, **options))

    async def __aenter__(self) -> Self:
        self._begin()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end(error)
        if error is None:
            await self._run()

    def __repr__(self) -> str:
        return f"Chain({len(self._traces)} traces, {self._state})"

    def _begin(self) -> None:
        if self._state != "new":
            raise graph_error("a chain runs once; make another one", ClosedTraceError)
        self._state = "open"

    def _end(self, error: BaseException | None) -> None:
        """Take no more traces; `error` is what has ended the block, if it was one."""
        self._state = "ended"
        for before, trace in zip([None, *self._traces], self._traces, strict=False):
            trace._after = before
            trace._waits_for_chain = False
            if error is not None and trace._recorder.failure is None:
                trace._recorder.failure = error

    async def _run(self) -> None:
        """Send all of them, and wait until they have run; raise what the first has failed with."""
        for trace in self._traces:
            trace._check_recorded()
        outcomes = await asyncio.gather(*self._traces, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    def _check_open(self) -> None:
        if self._state != "open":
            raise graph_error(
                "a chain is filled inside of its own block: `async with session.chain() as chain:`",
                ClosedTraceError,
            )

    def _add(self, trace: TraceT) -> TraceT:
        trace._waits_for_chain = True
        self._traces.append(trace)
        return trace
