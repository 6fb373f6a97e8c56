"""A trace: prompts and what to do with the model while it reads them.

async with session.trace(prompt) as trace: ...    records, submits at the end, and waits
with session.trace(prompt) as trace: ...          records; `result = await trace` runs it
result = await session.trace(prompt, function)    records by calling function(model)
"""

from __future__ import annotations

import asyncio
import uuid
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, get_args

from ndif_client.decoding import as_seed
from ndif_client.errors import (
    ClosedTraceError,
    GraphError,
    NdifError,
    NoValueError,
    TraceCancelledError,
    ValueUnknownError,
    graph_error,
)
from ndif_client.explanation import Explanation
from ndif_client.facts import Facts, explain_now
from ndif_client.held import earlier_requests
from ndif_client.progress import OnProgress, Progress
from ndif_client.prompts import Messages, Prompt, as_invoke
from ndif_client.recorder import Recorder
from ndif_client.recording import Recording, TraceFunction
from ndif_client.results import Result
from ndif_client.submission import Pending, Reply
from ndif_client.wire.messages import (
    MAX_AFTER,
    Decoding,
    Done,
    Generated,
    Logged,
    Numerics,
    Queued,
    Running,
    TraceRequest,
    ValueInfo,
)

if TYPE_CHECKING:
    from ndif_client.scanning import Scan
    from ndif_client.session import Session


class CommonOptions(TypedDict, total=False):
    """What traces and generations have in common."""

    messages: Messages | None
    numerics: Numerics
    on_progress: OnProgress | None
    progress: bool


class TraceOptions(CommonOptions, total=False):
    """The arguments of `Session.trace` after the first two."""

    decoder: Prompt | None
    seed: int | None


class Trace(Recording):
    """One experiment: recorded first, then run on the server, once.

    Values are saved by `value.save()`, or by giving them to an attribute: `trace.h = value`.
    """

    #: How tokens are chosen, where some are to be generated.
    _decoding: Decoding | None = None

    def __init__(
        self,
        session: Session,
        prompt: Prompt | None = None,
        function: TraceFunction | None = None,
        *,
        messages: Messages | None = None,
        decoder: Prompt | None = None,
        numerics: Numerics = "fast",
        seed: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        if numerics not in get_args(Numerics):
            raise graph_error(f"numerics={numerics!r:.80} can't be: it is 'fast' or 'solo'")
        self._id = uuid.uuid4().hex
        generates = self._decoding is not None
        recorder = Recorder(self._id, session._holder, seed=as_seed(seed), generates=generates)
        super().__init__(session, recorder)
        recorder.facts = Facts(self._ask)
        self._numerics: Numerics = numerics
        self._on_progress = on_progress
        #: the trace that it follows in a chain, and whether that has not been sent yet
        self._after: Trace | None = None
        self._waits_for_chain = False
        self._pending: Pending | None = None
        self._waiters = 0
        self._was_explained = False
        self._submitted_s = 0.0
        if prompt is not None or messages is not None:
            recorder.invokes.append(as_invoke(prompt, messages, decoder))
        elif decoder is not None:
            raise graph_error("decoder=... goes with a prompt, which the encoder reads")
        if function is not None:
            self._record(function)

    # ------------------------------------------------------------ what it is

    @property
    def id(self) -> str:
        """Its name on the server, known before it is sent."""
        return self._id

    @property
    def result(self) -> Result:
        """What came back, when it has run.

        Raises:
            NoValueError: it has not, or it failed.
        """
        if self._recorder.failure is not None:
            raise NoValueError(
                f"there is no result, because the {self._noun} has failed: {self._recorder.failure}"
            ) from self._recorder.failure
        if self._recorder.result is None:
            raise NoValueError(f"there is no result yet: `await` the {self._noun} to run it")
        return self._recorder.result

    def __repr__(self) -> str:
        recorder = self._recorder
        if recorder.result is not None:
            state = "done"
        elif recorder.failure is not None:
            state = "failed"
        elif self._pending is not None:
            state = "submitted"
        elif recorder.closed_at is not None:
            state = "recorded"
        else:
            state = "recording" if self._opened else "new"
        return f"{type(self).__name__}({self._id[:8]}, {state})"

    # ------------------------------------------------------------ running

    async def __aenter__(self) -> Self:
        self._open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close(error)
        if error is None:
            await self._run()

    def __await__(self) -> Generator[Any, None, Result]:
        return self._run().__await__()

    async def cancel(self) -> None:
        """End it, wherever it is; who awaits it gets `TraceCancelledError`. Ended, it stays so."""
        if self._recorder.result is not None or self._recorder.failure is not None:
            return
        error = TraceCancelledError(f"the {self._noun} was cancelled")
        if self._pending is None:
            self._recorder.failure = error
        elif not self._pending.reply.done():
            telling = self._session._submitter.cancel(self._pending, error)
            self._fail(error)
            if telling is not None:
                await telling

    async def explain(self) -> Explanation:
        """Return what it would cost, without running it; it can be run after that.

        Inside of its block this is about what has been recorded so far.

        Raises:
            ClosedTraceError: it was submitted already.
            NdifError: the server refuses it, or can't be reached.
        """
        if self._recorder.failure is not None:
            raise self._recorder.failure
        if self._pending is not None:
            raise graph_error(
                f"this {self._noun} was submitted already; explain it before that", ClosedTraceError
            )
        if not self._opened:
            self._record_nothing("explained")
        self._was_explained = True
        submitter = self._session._submitter
        return await submitter.explain(self._request(), self._recorder.buffers)

    def _ask(self) -> list[ValueInfo | None]:
        """Return what has been recorded so far is; the event loop stands still meanwhile."""
        try:
            request = self._request()
            buffers = self._recorder.buffers
            return explain_now(self._session._transport, request, buffers).values
        except GraphError as error:
            if not (self._waits_for_chain and self._recorder.used):
                raise
            # What an earlier trace of the chain keeps is not there before that has run.
            raise graph_error(
                f"nobody knows that yet, in a chain that has not begun: {error.message}",
                ValueUnknownError,
            ) from error

    async def scan(self) -> Scan:
        """Return the shapes and dtypes of everything recorded, without running it.

        Raises:
            ClosedTraceError: it was submitted already.
            NdifError: the server refuses it, or can't be reached.
        """
        from ndif_client.scanning import Scan

        return Scan(self._recorder, (await self.explain()).values)

    async def _run(self) -> Result:
        """Submit it, once, and wait for its result; cancelling this cancels it."""
        recorder = self._recorder
        if recorder.result is not None:
            return recorder.result
        pending = self._start()
        with self._awaiting(pending):
            done, buffers = await asyncio.shield(pending.reply)
        if recorder.result is None:
            recorder.result = self._result(done, buffers)
            self._tell(Progress(self._id, "done", elapsed_s=self._elapsed_s()))
        return recorder.result

    def _result(
        self, done: Done, buffers: list[memoryview], failure: Exception | None = None
    ) -> Result:
        recorder = self._recorder
        blocks = {number: recorder.block_of(number) for number in recorder.saves()}
        conditional = recorder.conditional_saves()
        tensors = self._session._tensors
        return Result(done, buffers, recorder.names, tensors, blocks, conditional, failure)

    def _start(self) -> Pending:
        """Return the request on its way, submitted now if it was not."""
        self._check_recorded()
        if self._waits_for_chain:
            raise graph_error(
                f"this {self._noun} is part of a chain, which runs at the end of its own block: "
                "record it with a plain `with`, and ask for its result after the chain",
                ClosedTraceError,
            )
        return self._pending or self._submit()

    def _check_recorded(self) -> None:
        """Refuse what has failed already, or was not recorded."""
        if self._recorder.failure is not None:
            raise self._recorder.failure
        if self._recorder.closed_at is None:
            self._record_nothing("awaited")
        if self._saves_nothing is not None:
            self._recorder.failure = self._saves_nothing
            raise self._saves_nothing

    def _record_nothing(self, what: str) -> None:
        """Do what is to be done when it is to run without having been recorded: refuse it."""
        where = "inside of its own block" if self._opened else "before it was recorded"
        raise graph_error(
            f"a {self._noun} is {what} {where}; record it with `with {self._noun}:` (or `async "
            "with`, which also runs it), and await it after that",
            ClosedTraceError,
        )

    @contextmanager
    def _awaiting(self, pending: Pending) -> Iterator[None]:
        """Within the block, somebody waits for the request; the last one who gives up ends it."""
        self._waiters += 1
        try:
            yield
        except asyncio.CancelledError:
            if self._waiters == 1:
                error = TraceCancelledError(f"the {self._noun} was cancelled while it was awaited")
                self._session._submitter.cancel(pending, error)
                self._fail(error)
            raise
        except Exception as error:
            self._fail(error)
            if isinstance(error, NdifError) and pending.partial and error.result is None:
                error.result = self._result(*pending.partial, error)
            raise
        finally:
            self._waiters -= 1
            if pending.reply.done():
                self._let_go()

    def _submit(self) -> Pending:
        self._submitted_s = asyncio.get_running_loop().time()
        try:
            request = self._request()
        except GraphError as error:  # a held value that will never be there
            self._recorder.failure = error
            raise
        self._session._drop_abandoned()
        self._pending = self._session._submitter.submit(
            request, self._recorder.buffers, self._note, self._take_tokens, self._take_line
        )
        self._recorder.origin.was_submitted = True
        self._session._holder.note_keeper(self._recorder.kept, self._recorder.origin)
        self._pending.reply.add_done_callback(self._note_end)
        return self._pending

    def _note_end(self, reply: asyncio.Future[Reply]) -> None:
        """Tell those who wait for what it keeps."""
        origin = self._recorder.origin
        if not reply.cancelled() and reply.exception() is None:
            origin.has_ended = True
        elif origin.failure is None and not reply.cancelled():
            origin.failure = reply.exception()

    def _let_go(self) -> None:
        """Let go of what only a request under way needs."""
        recorder = self._recorder
        recorder.buffers.clear()  # the constants have been sent
        recorder.used.clear()
        recorder.kept.clear()

    def _request(self) -> TraceRequest:
        after = earlier_requests(self._recorder)
        if self._after is not None and self._after.id not in after:
            after.append(self._after.id)
        if len(after) > MAX_AFTER:
            raise graph_error(
                f"this {self._noun} uses what {len(after)} traces keep that have not ended, at "
                f"most {MAX_AFTER} can be waited for; await some of them first"
            )
        return TraceRequest(
            id=self._id,
            model=self._session.tree.id,
            invokes=self._recorder.invokes,
            graph=self._recorder.graph(),
            decoding=self._decoding,
            numerics=self._numerics,
            session=self._session._holder.id,
            after=after,
        )

    def _take_line(self, event: Logged) -> None:
        self._recorder.logs.get(event.node, print)(event.text)

    def _take_tokens(self, event: Generated) -> None:
        """Note the tokens of one step; a trace has none."""

    def _note(self, event: Queued | Running) -> None:
        elapsed_s = self._elapsed_s()
        if isinstance(event, Queued):
            self._tell(Progress(self._id, "queued", event.position, elapsed_s=elapsed_s))
        else:
            self._tell(Progress(self._id, "running", groups=event.groups, elapsed_s=elapsed_s))

    def _fail(self, error: Exception) -> None:
        if self._recorder.failure is None:
            self._recorder.failure = error
            self._tell(Progress(self._id, "failed", elapsed_s=self._elapsed_s()))

    def _tell(self, progress: Progress) -> None:
        if self._on_progress is not None:
            self._on_progress(progress)

    def _elapsed_s(self) -> float:
        return asyncio.get_running_loop().time() - self._submitted_s

    def __del__(self) -> None:
        recorder: Recorder | None = self.__dict__.get("_recorder")
        if recorder is None or recorder.closed_at is None or recorder.failure is not None:
            return
        if self._pending is None and not self._was_explained:
            warnings.warn(
                f"the {self._noun} recorded at {recorder.closed_at} was never awaited, so it never "
                "ran",
                RuntimeWarning,
                stacklevel=2,
            )
