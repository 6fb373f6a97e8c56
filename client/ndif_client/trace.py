"""A trace: prompts and what to do with the model while it reads them.

async with session.trace(prompt) as trace: ...    records, submits at the end, and waits
with session.trace(prompt) as trace: ...          records; `result = await trace` runs it
result = await session.trace(prompt, function)    records by calling function(model)
"""

from __future__ import annotations

import asyncio
import uuid
import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from ndif_client.errors import ClosedTraceError, NoValueError, TraceCancelledError, graph_error
from ndif_client.naming import complete_names, save_structure, unsaved_variables
from ndif_client.progress import OnProgress, Progress
from ndif_client.prompts import Prompt, as_invoke
from ndif_client.recorder import Recorder
from ndif_client.results import Result
from ndif_client.sources import capture, user_frame
from ndif_client.submission import Pending
from ndif_client.wire.graph import MAX_INVOKES
from ndif_client.wire.messages import Queued, Running, TraceRequest

if TYPE_CHECKING:
    from ndif_client.session import Session

#: What a function given to `session.trace` may be.
TraceFunction = Callable[[Any], Any]


class Trace:
    """One experiment: recorded first, then run on the server, once.

    Values are saved by `value.save()`, or by giving them to an attribute: `trace.h = value`.
    """

    def __init__(
        self,
        session: Session,
        prompt: Prompt | None = None,
        function: TraceFunction | None = None,
        *,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._session = session
        self._recorder = Recorder()
        self._on_progress = on_progress
        self._stack = ExitStack()
        self._id = uuid.uuid4().hex
        self._opened = False
        self._pending: Pending | None = None
        self._waiters = 0
        self._submitted_s = 0.0
        if prompt is not None:
            self._recorder.invokes.append(as_invoke(prompt))
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
                f"there is no result, because the trace has failed: {self._recorder.failure}"
            ) from self._recorder.failure
        if self._recorder.result is None:
            raise NoValueError("there is no result yet: `await` the trace to run it")
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
        return f"Trace({self._id[:8]}, {state})"

    # ------------------------------------------------------------ recording

    def __enter__(self) -> Trace:
        self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close(error)

    def invoke(self, prompt: Prompt) -> AbstractContextManager[None]:
        """Add prompts of their own; reads and writes inside of the block are theirs.

        All invokes of a trace run in one forward, and values cross freely between them.

        Args:
            prompt: a text, token ids, or a list of either (one batch).
        """
        recorder = self._recorder
        recorder.check_open()
        if not self._opened:
            raise graph_error(
                "trace.invoke(...) belongs inside of the trace's own `with` block", ClosedTraceError
            )
        if len(recorder.invokes) >= MAX_INVOKES:
            raise graph_error(f"a trace has at most {MAX_INVOKES} invokes")
        recorder.invokes.append(as_invoke(prompt))
        return recorder.recording(len(recorder.invokes) - 1)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        if name in _OWN_NAMES:
            raise graph_error(
                f"a trace has its own {name!r}; give the value another name, or save it by "
                f".save({name!r})"
            )
        self._recorder.check_open()
        saved = save_structure(value, self._recorder, f"trace.{name}")
        self._recorder.name(name, saved, replace=True)
        self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"nothing was saved as {name!r} on this trace")

    def _open(self) -> None:
        if self._opened:
            raise graph_error("a trace is recorded once; make another one", ClosedTraceError)
        self._opened = True
        self._stack.enter_context(self._recorder.recording(0 if self._recorder.invokes else None))

    def _close(self, error: BaseException | None) -> None:
        self._stack.close()
        self._recorder.close(capture())
        if error is not None:
            self._recorder.failure = error
            return
        try:
            frame = user_frame()
            complete_names(self._recorder, frame)
            self._check(frame)
        except BaseException as refusal:
            self._recorder.failure = refusal
            raise

    def _record(self, function: TraceFunction) -> None:
        error: BaseException | None = None
        self._open()
        try:
            returned = function(self._session.model)
            if returned is not None:
                self._save_returned(returned)
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._close(error)

    def _save_returned(self, returned: Any) -> None:
        saved = save_structure(returned, self._recorder, "what the function returns")
        if isinstance(saved, int):
            saved = {"value": saved}
        names = saved.items() if isinstance(saved, dict) else enumerate(saved)
        for name, layout in names:
            self._recorder.name(str(name), layout)

    def _check(self, frame: FrameType | None) -> None:
        recorder = self._recorder
        if not recorder.invokes:
            raise graph_error(
                "this trace has no prompt: session.trace(prompt), or trace.invoke(prompt) inside"
            )
        if not recorder.names and not recorder.has_writes:
            held = " or ".join(map(repr, unsaved_variables(recorder, frame)))
            raise graph_error(
                "this trace saves nothing, so it would compute for nobody: call .save() on "
                f"{held or 'a value'}, give it to an attribute of the trace, or return it from "
                "the function"
            )

    # ------------------------------------------------------------ running

    async def __aenter__(self) -> Trace:
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

    async def _run(self) -> Result:
        """Submit the trace, once, and wait for its result; cancelling this cancels the trace."""
        recorder = self._recorder
        if recorder.result is not None:
            return recorder.result
        if recorder.failure is not None:
            raise recorder.failure
        if recorder.closed_at is None:
            where = "inside of its own block" if self._opened else "before it was recorded"
            raise graph_error(
                f"a trace is awaited {where}; record it with `with trace:` (or `async with`, which "
                "also runs it), and await it after that",
                ClosedTraceError,
            )
        pending = self._pending or self._submit()
        self._waiters += 1
        try:
            done, buffers = await asyncio.shield(pending.reply)
        except asyncio.CancelledError:
            if self._waiters == 1:
                self._session._submitter.cancel(pending)
                self._fail(TraceCancelledError("the trace was cancelled while it was awaited"))
            raise
        except Exception as error:
            self._fail(error)
            raise
        finally:
            self._waiters -= 1
            if pending.reply.done():
                self._recorder.buffers.clear()  # the constants have been sent
        if recorder.result is None:
            recorder.result = Result(done, buffers, recorder.names, self._session._tensors)
            self._tell(Progress(self._id, "done", elapsed_s=self._elapsed_s()))
        return recorder.result

    def _submit(self) -> Pending:
        request = TraceRequest(
            id=self._id,
            model=self._session.tree.id,
            invokes=self._recorder.invokes,
            graph=self._recorder.graph(),
        )
        self._submitted_s = asyncio.get_running_loop().time()
        self._pending = self._session._submitter.submit(request, self._recorder.buffers, self._note)
        return self._pending

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
        if self._pending is None:
            warnings.warn(
                f"the trace recorded at {recorder.closed_at} was never awaited, so it never ran",
                RuntimeWarning,
                stacklevel=2,
            )


_OWN_NAMES = frozenset(name for name in vars(Trace) if not name.startswith("_"))
