"""Traces and generations that run without `await`, and the event loop in a thread they run on."""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar, Unpack

from ndif_client.chain import Chain
from ndif_client.explanation import Explanation
from ndif_client.generation import GenerateOptions, Generation, StepsIndex
from ndif_client.prompts import Messages, Prompt
from ndif_client.results import Result
from ndif_client.scanning import Scan
from ndif_client.streaming import Token, TokenStream
from ndif_client.trace import Trace, TraceOptions

T = TypeVar("T")
TraceT = TypeVar("TraceT", bound=Trace)


class Runner(Protocol):
    """What a blocking session does for its traces."""

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the session's event loop and wait for it."""
        ...

    def run(self, trace: Trace) -> None:
        """Run a recorded trace and wait for it, or put it aside to be run with others."""
        ...


class _Blocking(Generic[TraceT]):
    """What traces and generations share: they record, and run at the end of their block."""

    def __init__(self, trace: TraceT, runner: Runner) -> None:
        self._trace = trace
        self._runner = runner

    @property
    def id(self) -> str:
        """Its name on the server."""
        return self._trace.id

    @property
    def result(self) -> Result:
        """What came back, when it has run."""
        return self._trace.result

    def invoke(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        decoder: Prompt | None = None,
    ) -> AbstractContextManager[None]:
        """Add prompts of their own; reads and writes inside of the block are theirs."""
        return self._trace.invoke(prompt, messages=messages, decoder=decoder)

    def cancel(self) -> None:
        """End it, wherever it is."""
        self._runner.wait(self._trace.cancel())

    def explain(self) -> Explanation:
        """Return what it would cost; inside of its block, what is recorded so far."""
        return self._runner.wait(self._trace.explain())

    def scan(self) -> Scan:
        """Return the shapes of everything recorded so far, without running it."""
        return self._runner.wait(self._trace.scan())

    def __enter__(self) -> Self:
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
            self._runner.run(self._trace)

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


class BlockingTrace(_Blocking[Trace]):
    """A trace that runs at the end of its block. Otherwise as `ndif_client.Trace`."""


class BlockingGeneration(_Blocking[Generation]):
    """A generation that runs at the end of its block, or, having none, when it is first asked.

    `for token in gen` streams it; after its block, all tokens are there already. Otherwise as
    `ndif_client.Generation`.
    """

    @property
    def result(self) -> Result:
        """What came back; a generation without a block is run for it.

        Raises:
            NoValueError: it is still being recorded, was put aside, or has failed.
        """
        was_recorded = self._trace._opened and self._trace._pending is None
        if was_recorded or self._trace._recorder.failure is not None:
            return self._trace.result
        return self._runner.wait(awaited(self._trace))

    @property
    def seed(self) -> int:
        """The seed of its sampling: given, or drawn for it."""
        return self._trace.seed

    def all(self) -> AbstractContextManager[None]:
        """Return a block whose code is about every step, the prefill included."""
        return self._trace.all()

    @property
    def steps(self) -> StepsIndex:
        """Blocks for some steps: `gen.steps[3]`, `gen.steps[1:]`, `gen.steps[2:10:2]`."""
        return self._trace.steps

    def prefill(self) -> AbstractContextManager[None]:
        """Return a block whose code is about step 0, as code outside of all such blocks is."""
        return self._trace.prefill()

    def stop_when(self, condition: Any) -> None:
        """End the generation with a step where a value is not 0; see `ndif_client.Generation`."""
        self._trace.stop_when(condition)

    def __iter__(self) -> Iterator[Token]:
        stream = TokenStream(self._trace)
        while (token := self._runner.wait(_next(stream))) is not None:
            yield token


class BlockingChain:
    """Traces that run one after another at the end of the chain's block; as `ndif_client.Chain`."""

    def __init__(self, chain: Chain, runner: Runner) -> None:
        self._chain = chain
        self._runner: Runner = _InChain(runner)
        self._traces: list[BlockingTrace | BlockingGeneration] = []

    @property
    def traces(self) -> list[BlockingTrace | BlockingGeneration]:
        """All of them, in order."""
        return list(self._traces)

    @property
    def results(self) -> list[Result]:
        """What came back for each of them, when the chain has run."""
        return self._chain.results

    def trace(self, prompt: Prompt | None = None, **options: Unpack[TraceOptions]) -> BlockingTrace:
        """Add a trace, which `with` records."""
        trace = BlockingTrace(self._chain.trace(prompt, **options), self._runner)
        self._traces.append(trace)
        return trace

    def generate(
        self, prompt: Prompt | None = None, **options: Unpack[GenerateOptions]
    ) -> BlockingGeneration:
        """Add a generation, which `with` records."""
        generation = BlockingGeneration(self._chain.generate(prompt, **options), self._runner)
        self._traces.append(generation)
        return generation


class _InChain:
    """Leaves recorded traces to the end of their chain."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the session's event loop and wait for it."""
        return self._runner.wait(work)

    def run(self, trace: Trace) -> None:
        """Leave it."""


async def awaited(awaitable: Awaitable[T]) -> T:
    """Await something that is no coroutine, where one is wanted."""
    return await awaitable


async def _next(stream: TokenStream) -> Token | None:
    # None and not StopAsyncIteration, which would not pass through a future as itself.
    return await anext(stream, None)
