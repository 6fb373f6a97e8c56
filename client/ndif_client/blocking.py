"""The same client for plain scripts: nothing is awaited.

    from ndif_client.blocking import connect

    with connect("http://127.0.0.1:8000") as session:
        with session.trace(prompt) as trace:          # runs at the end of the block
            hidden = session.model.model.layers[3].output.save()
        hidden.value

One implementation: everything runs on a private event loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, TypeVar, overload

from ndif_client.envoy import Envoy
from ndif_client.errors import BlockingCallError, graph_error
from ndif_client.progress import OnProgress
from ndif_client.prompts import Prompt
from ndif_client.results import Result
from ndif_client.session import Session
from ndif_client.session import connect as connect_async
from ndif_client.trace import Trace, TraceFunction
from ndif_client.wire.messages import ModelSummary, ModelTree, TokenizeReply
from ndif_client.wire.tensors import ArrayKind

T = TypeVar("T")


class _LoopThread:
    """An event loop in a thread, and calls into it from outside."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="ndif-client", daemon=True
        )
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it; Ctrl-C cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """End the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class BlockingTrace:
    """A trace that runs at the end of its block. Otherwise as `ndif_client.Trace`."""

    def __init__(self, trace: Trace, session: BlockingSession) -> None:
        self._trace = trace
        self._session = session

    @property
    def id(self) -> str:
        """Its name on the server."""
        return self._trace.id

    @property
    def result(self) -> Result:
        """What came back, when it has run."""
        return self._trace.result

    def invoke(self, prompt: Prompt) -> AbstractContextManager[None]:
        """Add prompts of their own; reads and writes inside of the block are theirs."""
        return self._trace.invoke(prompt)

    def __enter__(self) -> BlockingTrace:
        self._trace.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._trace.__exit__(kind, error, traceback)
        if error is None:
            self._session._run(self._trace)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._trace, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._trace, name)

    def __repr__(self) -> str:
        return repr(self._trace)


class BlockingSession:
    """A session whose calls wait for their outcome. Made by `connect`.

    Attributes:
        tree: the model as data.
        model: the model to write experiments on.
    """

    def __init__(self, session: Session, thread: _LoopThread) -> None:
        self.tree: ModelTree = session.tree
        self.model: Envoy = session.model
        self._session = session
        self._thread = thread
        self._together: list[Trace] | None = None
        self._open = True

    @overload
    def trace(
        self,
        prompt: Prompt | None = None,
        function: None = None,
        *,
        on_progress: OnProgress | None = None,
        progress: bool = False,
    ) -> BlockingTrace: ...

    @overload
    def trace(
        self,
        prompt: Prompt | None,
        function: TraceFunction,
        *,
        on_progress: OnProgress | None = None,
        progress: bool = False,
    ) -> Result: ...

    def trace(
        self,
        prompt: Prompt | None = None,
        function: TraceFunction | None = None,
        *,
        on_progress: OnProgress | None = None,
        progress: bool = False,
    ) -> BlockingTrace | Result:
        """Open an experiment, or run one given as a function and return its result.

        Arguments are those of `Session.trace`; `on_progress` is called in another thread.
        """
        _refuse_in_loop("session.trace(...)", "async with session.trace(...)")
        if function is not None and self._together is not None:
            raise graph_error(
                "inside of session.together() there is no result yet to return; use "
                "`with session.trace(...) as trace:`"
            )
        trace = self._session.trace(prompt, function, on_progress=on_progress, progress=progress)
        if function is None:
            return BlockingTrace(trace, self)
        result: Result = self._thread.call(_awaited(trace))
        return result

    @contextmanager
    def together(self) -> Iterator[None]:
        """Submit all traces recorded inside of the block at its end, so they can share a forward.

        Raises:
            ExceptionGroup: several of them failed; a single failure is raised as itself.
        """
        self._together = []
        try:
            yield
            traces = self._together
        finally:
            self._together = None
        outcomes = self._thread.call(_gathered(traces))
        errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ExceptionGroup(f"{len(errors)} of {len(traces)} traces failed", errors)

    def tokenize(self, text: str) -> TokenizeReply:
        """Return how the model's tokenizer splits a text: `ids`, and the text of each."""
        return self._thread.call(self._session.tokenize(text))

    def decode(self, ids: Any) -> str:
        """Return the text of token ids: a number, a list of them, or an array or tensor."""
        return self._thread.call(self._session.decode(ids))

    def models(self) -> list[ModelSummary]:
        """Return the models this server offers."""
        return self._thread.call(self._session.models())

    def close(self) -> None:
        """Cancel what is under way, close all connections, stop a private server."""
        if self._open:
            self._open = False
            self._thread.call(self._session.close())
            self._thread.stop()

    def __enter__(self) -> BlockingSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Blocking{self._session!r}"

    def _run(self, trace: Trace) -> None:
        if self._together is not None:
            self._together.append(trace)
        else:
            self._thread.call(_awaited(trace))


def connect(
    url: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    tensors: ArrayKind = "auto",
    timeout: float = 30.0,
    serve_options: Sequence[str] = (),
) -> BlockingSession:
    """Connect and wait until it is done. Arguments and errors are those of `ndif_client.connect`.

    Raises:
        BlockingCallError: an event loop is running here; use `ndif_client.connect` and `await`.
    """
    _refuse_in_loop("ndif_client.blocking.connect(...)", "async with ndif_client.connect(...)")
    connecting = connect_async(
        url,
        model=model,
        api_key=api_key,
        tensors=tensors,
        timeout=timeout,
        serve_options=serve_options,
    )
    thread = _LoopThread()
    try:
        return BlockingSession(thread.call(_awaited(connecting)), thread)
    except BaseException:
        thread.stop()
        raise


def _refuse_in_loop(called: str, instead: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise BlockingCallError(
        f"{called} would stop the event loop that is running here (a notebook has one, too); use "
        f"`{instead}` and `await`"
    )


async def _awaited(awaitable: Awaitable[T]) -> T:
    return await awaitable


async def _gathered(traces: list[Trace]) -> list[Result | BaseException]:
    return await asyncio.gather(*traces, return_exceptions=True)
