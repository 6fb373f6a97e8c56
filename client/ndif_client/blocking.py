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
import os
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar, Unpack, overload

from ndif_client import lora
from ndif_client.blocking_traces import (
    BlockingChain,
    BlockingGeneration,
    BlockingTrace,
    awaited,
)
from ndif_client.caching import Modules
from ndif_client.connecting import connect as connect_async
from ndif_client.edits import Edit, EditRecording, Edits
from ndif_client.envoy import Envoy
from ndif_client.errors import BlockingCallError, graph_error
from ndif_client.explanation import Explanation
from ndif_client.generation import GenerateOptions
from ndif_client.held import Handle
from ndif_client.loop_thread import LoopThread
from ndif_client.prompts import Prompt
from ndif_client.recording import TraceFunction
from ndif_client.results import Result
from ndif_client.session import Session
from ndif_client.trace import Trace, TraceOptions
from ndif_client.wire.messages import HeldSpec, ModelSummary, ModelTree, TokenizeReply
from ndif_client.wire.tensors import ArrayKind

__all__ = [
    "BlockingChain",
    "BlockingGeneration",
    "BlockingSession",
    "BlockingTrace",
    "LoRA",
    "connect",
]

T = TypeVar("T")


class BlockingSession:
    """A session whose calls wait for their outcome. Made by `connect`.

    Attributes:
        tree: the model as data.
        model: the model to write experiments on.
    """

    def __init__(self, session: Session, thread: LoopThread) -> None:
        self.tree: ModelTree = session.tree
        self.model: Envoy = session.model
        self._session = session
        self._thread = thread
        self._together: list[Trace] | None = None
        self._open = True
        #: whether the connection belongs to another session
        self._shares = False

    @property
    def url(self) -> str:
        """The server's address."""
        return self._session.url

    @property
    def edits(self) -> Edits:
        """The changes of the model that every later trace and generation has."""
        return self._session.edits

    def edit(self, name: str) -> EditRecording:
        """Record a change of the model that is to apply to later traces; see `Session.edit`."""
        return self._session.edit(name)

    def with_edits(self, *edits: Edit) -> BlockingSession:
        """Return another handle of this session, with these edits besides its own."""
        other = BlockingSession(self._session.with_edits(*edits), self._thread)
        other._shares = True
        return other

    @overload
    def trace(
        self,
        prompt: Prompt | None = None,
        function: None = None,
        **options: Unpack[TraceOptions],
    ) -> BlockingTrace: ...

    @overload
    def trace(
        self,
        prompt: Prompt | None,
        function: TraceFunction,
        **options: Unpack[TraceOptions],
    ) -> Result: ...

    def trace(
        self,
        prompt: Prompt | None = None,
        function: TraceFunction | None = None,
        **options: Unpack[TraceOptions],
    ) -> BlockingTrace | Result:
        """Open an experiment, or run one given as a function and return its result.

        Arguments are those of `Session.trace`; `on_progress` is called in another thread.
        """
        _refuse_in_loop("session.trace(...)", "async with session.trace(...)")
        if function is not None:
            self._refuse_together("trace")
        trace = self._session.trace(prompt, function, **options)
        if function is None:
            return BlockingTrace(trace, self)
        result: Result = self._thread.call(awaited(trace))
        return result

    @overload
    def generate(
        self,
        prompt: Prompt | None = None,
        function: None = None,
        **options: Unpack[GenerateOptions],
    ) -> BlockingGeneration: ...

    @overload
    def generate(
        self,
        prompt: Prompt | None,
        function: TraceFunction,
        **options: Unpack[GenerateOptions],
    ) -> Result: ...

    def generate(
        self,
        prompt: Prompt | None = None,
        function: TraceFunction | None = None,
        **options: Unpack[GenerateOptions],
    ) -> BlockingGeneration | Result:
        """Let the model go on after prompts, or run a function's experiment on that.

        Arguments are those of `Session.generate`; `on_progress` is called in another thread.

        Example:
            for token in session.generate("Once upon", max_new_tokens=50):
                print(token.text, end="")
        """
        _refuse_in_loop("session.generate(...)", "async with session.generate(...)")
        if function is not None:
            self._refuse_together("generate")
        generation = self._session.generate(prompt, function, **options)
        if function is None:
            return BlockingGeneration(generation, self)
        result: Result = self._thread.call(awaited(generation))
        return result

    def explain(self, trace: BlockingTrace | BlockingGeneration) -> Explanation:
        """Return what a trace or generation would cost: what is recorded of it so far."""
        return trace.explain()

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

    @contextmanager
    def chain(self) -> Iterator[BlockingChain]:
        """Run all traces recorded inside of the block at its end, one after another.

        As `Session.chain`; each trace is recorded by `with chain.trace(...):`.
        """
        self._refuse_together("chain")
        chain = self._session.chain()
        chain._begin()
        try:
            yield BlockingChain(chain, self)
        except BaseException as error:
            chain._end(error)
            raise
        chain._end(None)
        self._thread.call(chain._run())

    def held(self, name: str) -> Handle:
        """Return what stands for a held value; as `Session.held`."""
        return self._session.held(name)

    def held_values(self) -> dict[str, HeldSpec]:
        """Return what the server holds for this session; as `Session.held_values`."""
        return self._thread.call(self._session.held_values())

    def drop(self, *handles: Handle | str) -> None:
        """Have the server let go of held values; as `Session.drop`."""
        self._thread.call(self._session.drop(*handles))

    def fetch(self, handle: Handle | str) -> Any:
        """Return a held value; as `Session.fetch`."""
        return self._thread.call(self._session.fetch(handle))

    def upload(self, array: Any, name: str | None = None) -> Handle:
        """Have the server hold a copy of an array or tensor; as `Session.upload`."""
        return self._thread.call(self._session.upload(array, name))

    def upload_file(
        self, path: str | os.PathLike[str], prefix: str | None = None
    ) -> dict[str, Handle]:
        """Have the server hold the tensors of a file; as `Session.upload_file`."""
        return self._thread.call(self._session.upload_file(path, prefix))

    def download(self, handles: Mapping[str, Handle | str], path: str | os.PathLike[str]) -> None:
        """Write held values to a file; as `Session.download`."""
        self._thread.call(self._session.download(handles, path))

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
        if self._open and not self._shares:
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

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of this session's and wait for it; Ctrl-C cancels it."""
        return self._thread.call(work)

    def run(self, trace: Trace) -> None:
        """Run a recorded trace, or leave it to the end of `together`."""
        if self._together is not None:
            self._together.append(trace)
        else:
            self._thread.call(awaited(trace))

    def _refuse_together(self, maker: str) -> None:
        if self._together is not None:
            raise graph_error(
                "inside of session.together() there is no result yet to return; use "
                f"`with session.{maker}(...) as {'trace' if maker == 'trace' else 'gen'}:`"
            )


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
    thread = LoopThread()
    try:
        return BlockingSession(thread.call(awaited(connecting)), thread)
    except BaseException:
        thread.stop()
        raise


class LoRA(lora.LoRA):
    """`ndif_client.lora.LoRA`, whose calls wait for their outcome."""

    @classmethod
    def create(  # type: ignore[override]
        cls, session: BlockingSession, modules: Modules, **options: Any
    ) -> LoRA:
        """Make a fresh adapter; as `ndif_client.lora.LoRA.create`."""
        return session.wait(super().create(session._session, modules, **options))  # type: ignore[return-value]

    @classmethod
    def load(  # type: ignore[override]
        cls, session: BlockingSession, folder: str | os.PathLike[str], *, name: str | None = None
    ) -> LoRA:
        """Upload an adapter that PEFT has saved; as `ndif_client.lora.LoRA.load`."""
        return session.wait(super().load(session._session, folder, name=name))  # type: ignore[return-value]

    def save(  # type: ignore[override]
        self, session: BlockingSession, folder: str | os.PathLike[str]
    ) -> None:
        """Write it as PEFT does; as `ndif_client.lora.LoRA.save`."""
        session.wait(super().save(session._session, folder))


def _refuse_in_loop(called: str, instead: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise BlockingCallError(
        f"{called} would stop the event loop that is running here (a notebook has one, too); use "
        f"`{instead}` and `await`"
    )


async def _gathered(traces: list[Trace]) -> list[Result | BaseException]:
    return await asyncio.gather(*traces, return_exceptions=True)
