"""A trace: prompts and what to do with the model while it reads them.

async with session.trace(prompt) as trace: ...    records, submits at the end, and waits
with session.trace(prompt) as trace: ...          records; `result = await trace` runs it
result = await session.trace(prompt, function)    records by calling function(model)
"""

from __future__ import annotations

import asyncio
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypedDict, get_args

from ndif_client.arguments import encode
from ndif_client.decoding import as_seed
from ndif_client.errors import (
    ClosedTraceError,
    GraphError,
    NdifError,
    NoValueError,
    TraceCancelledError,
    graph_error,
)
from ndif_client.explanation import Explanation
from ndif_client.held import earlier_requests
from ndif_client.naming import complete_names, save_structure, unsaved_variables
from ndif_client.progress import OnProgress, Progress
from ndif_client.prompts import Messages, Prompt, as_invoke
from ndif_client.proxy import Proxy
from ndif_client.recorder import Recorder
from ndif_client.results import Result
from ndif_client.sources import capture, user_frame
from ndif_client.steps import Block
from ndif_client.submission import Pending, Reply
from ndif_client.wire.graph import MAX_INVOKES, MAX_LOGGED, Ref
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
)

if TYPE_CHECKING:
    from ndif_client.branches import Branch
    from ndif_client.caching import Cache, Modules
    from ndif_client.scanning import Scan
    from ndif_client.session import Session

#: What a function given to `session.trace` may be.
TraceFunction = Callable[[Any], Any]


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


class Trace:
    """One experiment: recorded first, then run on the server, once.

    Values are saved by `value.save()`, or by giving them to an attribute: `trace.h = value`.
    """

    #: What it is called in messages, and what makes one.
    _noun: ClassVar[str] = "trace"
    _maker: ClassVar[str] = "session.trace"

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
        self._session = session
        self._numerics: Numerics = numerics
        self._id = uuid.uuid4().hex
        generates = self._decoding is not None
        self._recorder = Recorder(
            self._id, session._holder, seed=as_seed(seed), generates=generates
        )
        self._on_progress = on_progress
        self._stack = ExitStack()
        self._caches: list[tuple[Cache, int, Block, str]] = []
        #: the trace that it follows in a chain, and whether that has not been sent yet
        self._after: Trace | None = None
        self._waits_for_chain = False
        self._opened = False
        self._pending: Pending | None = None
        self._waiters = 0
        self._was_explained = False
        self._submitted_s = 0.0
        if prompt is not None or messages is not None:
            self._recorder.invokes.append(as_invoke(prompt, messages, decoder))
        elif decoder is not None:
            raise graph_error("decoder=... goes with a prompt, which the encoder reads")
        if function is not None:
            self._record(function)

    @property
    def seed(self) -> int:
        """The seed of its random numbers: given, or drawn for it."""
        return self._recorder.seed

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

    # ------------------------------------------------------------ recording

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close(error)

    def invoke(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        decoder: Prompt | None = None,
    ) -> AbstractContextManager[None]:
        """Add prompts of their own; reads and writes inside of the block are theirs.

        All invokes of a trace run in one forward, and values cross freely between them.

        Args:
            prompt: a text, token ids, or a list of either (one batch).
            messages: a conversation in its place, or a list of them.
            decoder: what the decoder of an encoder-decoder model reads; see `Session.trace`.

        Raises:
            GraphError: that is no prompt.
            ClosedTraceError: nothing is recorded here.
        """
        recorder = self._recorder
        recorder.check_open()
        if not self._opened:
            raise graph_error(
                f"invoke(...) belongs inside of the {self._noun}'s own `with` block",
                ClosedTraceError,
            )
        if len(recorder.invokes) >= MAX_INVOKES:
            raise graph_error(f"a {self._noun} has at most {MAX_INVOKES} invokes")
        recorder.invokes.append(as_invoke(prompt, messages, decoder))
        return self._invoked(len(recorder.invokes) - 1)

    @contextmanager
    def _invoked(self, invoke: int) -> Iterator[None]:
        self._play_edits(invoke)
        with self._recorder.recording(invoke):
            yield

    def _play_edits(self, invoke: int) -> None:
        for edit in self._session._edits or ():
            edit.play(self._recorder, invoke, self._session.tree)

    def cache(
        self,
        modules: Modules | None = None,
        *,
        inputs: bool = False,
        outputs: bool = True,
        name: str = "cache",
    ) -> Cache:
        """Save what many modules return, as it is at the end of the block.

        Args:
            modules: modules, their paths, or patterns such as "model.layers.*.mlp", or several of
                them; by default the residual stream after each layer.
            inputs: save what they are given, too (the first tensor of it).
            outputs: save what they return.
            name: what the result calls it.

        Returns:
            A mapping from module paths to values, when the trace has run.

        Raises:
            GraphError: there are no such modules.
        """
        from ndif_client.caching import Cache

        self._recorder.check_open()
        invoke = self._recorder.here("cache()")
        cache = Cache(self._session.model, modules, inputs=inputs, outputs=outputs)
        self._caches.append((cache, invoke, self._recorder.block, name))
        return cache

    async def scan(self) -> Scan:
        """Return the shapes and dtypes of everything recorded, without running it.

        Raises:
            ClosedTraceError: it was submitted already.
            NdifError: the server refuses it, or can't be reached.
        """
        from ndif_client.scanning import Scan

        return Scan(self._recorder, (await self.explain()).values)

    # ------------------------------------------------------------ control

    def when(self, condition: Any) -> Branch:
        """Return a block whose code runs only if a value is not 0: `with trace.when(x > 3):`.

        Args:
            condition: a value of one element.

        Returns:
            The block; its `otherwise()` is the block for the other case.

        Raises:
            GraphError: the condition is no value of the trace.
        """
        from ndif_client.branches import branch

        return branch(condition, self._recorder)

    def log(self, *items: Any, to: Callable[[str], object] = print) -> None:
        """Print texts and values while it runs, as soon as the model has got there.

        `trace.log("norm", h.norm())` prints a line such as `norm 3.25`; of a large value the first
        and last numbers. A request logs at most 10,000 lines of 4,096 characters.

        Args:
            items: texts, numbers, and values of the trace.
            to: called with each line.

        Raises:
            GraphError: something is no value of this trace.
        """
        if not callable(to):
            raise graph_error(f"to={to!r:.80}: it is called with each line, as print is")
        if not items or len(items) > MAX_LOGGED:
            raise graph_error(f"a line has 1 to {MAX_LOGGED} texts and values")
        logged: list[Ref | str] = []
        for item in items:
            if isinstance(item, str | int | float):
                logged.append(str(item))
            else:
                argument = encode(item, self._recorder)
                if not isinstance(argument, Ref):
                    raise graph_error(f"a line has texts and values, not {type(item).__name__}")
                logged.append(argument)
        self._recorder.log(logged, to)

    def choose(self, condition: Any, then: Any, otherwise: Any) -> Proxy:
        """Return `then` if a condition holds, else `otherwise`, which has the same shape and dtype.

        Unlike `ops.where`, either may come from a `when` block, and only one of them is computed.
        """
        from ndif_client.branches import choose

        return choose(condition, then, otherwise, self._recorder)

    def while_loop(
        self,
        condition: Callable[..., Any],
        body: Callable[..., Any],
        state: Any,
        *,
        limit: int,
    ) -> Any:
        """Repeat while a condition holds, at most `limit` times.

        Args:
            condition: called with the state, returns a value of one element.
            body: called with the state, returns the next one, of equal shapes and dtypes.
            state: a value or number to begin with, or a tuple of them.
            limit: rounds at most, 1 to 256; after so many it ends, whatever the condition says.

        Returns:
            The last state.

        Raises:
            GraphError: the bound or a state can't be.
        """
        from ndif_client.branches import while_loop

        return while_loop(condition, body, state, limit, self._recorder)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        if hasattr(type(self), name):
            raise graph_error(
                f"a {self._noun} has its own {name!r}; give the value another name, or save it by "
                f".save({name!r})"
            )
        self._recorder.check_open()
        saved = save_structure(value, self._recorder, f"{self._noun}.{name}")
        self._recorder.name(name, saved, replace=True)
        self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        if name in ("all", "prefill", "steps"):
            raise AttributeError(f"no {name!r}: a trace has one step; use session.generate(...)")
        raise AttributeError(f"nothing was saved as {name!r} on this {self._noun}")

    def _open(self) -> None:
        if self._opened:
            raise graph_error(
                f"a {self._noun} is recorded once; make another one", ClosedTraceError
            )
        self._opened = True
        if self._recorder.invokes:
            self._play_edits(0)
        self._stack.enter_context(self._recorder.recording(0 if self._recorder.invokes else None))

    def _close(self, error: BaseException | None) -> None:
        self._stack.close()
        try:
            if error is None:
                self._record_caches()
        except BaseException as refusal:
            self._recorder.failure = refusal
            raise
        finally:
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

    def _record_caches(self) -> None:
        for cache, invoke, block, name in self._caches:
            cache.record(self._recorder, invoke, block, name)

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
        if not recorder.invokes and (recorder.is_empty or recorder.generates):
            raise graph_error(
                f"this {self._noun} has no prompt: {self._maker}(prompt), or invoke(prompt) inside"
            )
        self._check_saves(frame)

    def _check_saves(self, frame: FrameType | None) -> None:
        recorder = self._recorder
        if not recorder.names and not recorder.has_effects:
            held = " or ".join(map(repr, unsaved_variables(recorder, frame)))
            raise graph_error(
                f"this {self._noun} saves nothing, so it would compute for nobody: call .save() on "
                f"{held or 'a value'}, give it to an attribute of the {self._noun}, or return it "
                "from the function"
            )

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
        after = earlier_requests(self._recorder.used.values())
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
