"""A generation: prompts, what to do with the model while it goes on after them, and the tokens.

async with session.generate(prompt, max_new_tokens=20) as gen: ...  records, runs it, and waits
with session.generate(prompt) as gen: ...                           records; await it, or stream it
async for token in session.generate(prompt): ...                    streams the tokens
result = await session.generate(prompt)                             only its result
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import TYPE_CHECKING, Any

from ndif_client.decoding import DecodingOptions, as_decoding
from ndif_client.errors import ClosedTraceError, graph_error
from ndif_client.progress import OnProgress, Progress
from ndif_client.prompts import Messages, Prompt
from ndif_client.recorder import Recorder
from ndif_client.recording import TraceFunction
from ndif_client.steps import PREFILL_BLOCK, Block, block_at
from ndif_client.streaming import Token, TokenLog, TokenStream
from ndif_client.submission import Pending, Reply
from ndif_client.trace import CommonOptions, Trace
from ndif_client.wire.graph import Steps
from ndif_client.wire.messages import Decoding, Generated, Numerics

if TYPE_CHECKING:
    from ndif_client.session import Session


class GenerateOptions(DecodingOptions, CommonOptions, total=False):
    """The arguments of `Session.generate` after the first two."""


class StepsIndex:
    """`gen.steps`: index it by a step or a slice of steps to get a block."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def __getitem__(self, index: int | slice) -> AbstractContextManager[None]:
        """Return a block whose code is about these steps; step 0 is the prefill.

        Raises:
            GraphError: a step is negative, or not below `max_new_tokens`.
        """
        generation = self._generation
        return generation._during(block_at(index, generation._decoding.max_new_tokens))


class _StepsBlock(AbstractContextManager[None]):
    """What is written within the block is about some steps of a generation."""

    def __init__(self, recorder: Recorder, block: Block) -> None:
        self._recorder = recorder
        self._block = block
        self._during: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        self._during = self._recorder.during(self._block)
        self._during.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        assert self._during is not None
        return self._during.__exit__(*error)

    def __iter__(self) -> Iterator[None]:
        raise graph_error(
            "steps are no loop: what is written once under `with gen.all():` (or gen.steps[2:5]) "
            "runs at each of them, on the server"
        )


class Generation(Trace):
    """One experiment on a model while it generates: recorded, if at all, then run once.

    Step 0, the prefill, reads the prompts and makes the first token of each; step k reads token
    k - 1 and makes token k. Code of its block is about step 0, as in a trace, and code inside of
    `all()` or `steps[...]` about those steps: what it reads there has one token, the newest, and
    what it saves is a list of one value for each step reached. The value of a single step can be
    used in later ones.

    `async for token in gen` streams it, each loop from the first token on: tokens are kept in
    memory, so a slow reader slows nobody down. Leaving the loop early does not end the generation;
    `await gen.cancel()` does, and so does cancelling the task that waits for its next token, if
    nobody else waits for it or for the result.
    """

    _noun = "generation"
    _maker = "session.generate"
    _decoding: Decoding

    def __init__(
        self,
        session: Session,
        prompt: Prompt | None,
        function: TraceFunction | None,
        decoding: DecodingOptions,
        *,
        messages: Messages | None = None,
        numerics: Numerics = "fast",
        on_progress: OnProgress | None = None,
    ) -> None:
        self._decoding = as_decoding(decoding)
        self._log = TokenLog()
        self._news = asyncio.Event()
        super().__init__(
            session,
            prompt,
            function,
            messages=messages,
            numerics=numerics,
            seed=self._decoding.seed,
            on_progress=on_progress,
        )

    # ------------------------------------------------------------ recording

    def all(self) -> AbstractContextManager[None]:
        """Return a block whose code is about every step, the prefill included."""
        return self._during(Block(Steps(), as_list=True))

    @property
    def steps(self) -> StepsIndex:
        """Blocks for some steps: `gen.steps[3]`, `gen.steps[1:]`, `gen.steps[2:10:2]`."""
        return StepsIndex(self)

    def prefill(self) -> AbstractContextManager[None]:
        """Return a block whose code is about step 0, as code outside of all such blocks is."""
        return self._during(PREFILL_BLOCK)

    def stop_when(self, condition: Any) -> None:
        """End the generation with a step where a value is not 0: `gen.stop_when(p < 0.5)`.

        The token of that step is the last, of each sequence, and `finish` is then "condition".

        Args:
            condition: a value of one element, read in the block of the steps it is about.

        Raises:
            GraphError: the condition is no value of the generation.
        """
        from ndif_client.branches import end_generation

        end_generation(condition, self._recorder)

    def _during(self, block: Block) -> AbstractContextManager[None]:
        return _StepsBlock(self._recorder, block)

    def _check_saves(self, frame: FrameType | None) -> None:
        if not self._recorder.is_empty:  # else the tokens are what it is for
            super()._check_saves(frame)

    def _record_nothing(self, what: str) -> None:
        if self._opened:
            raise graph_error(
                f"a generation is {what} inside of its own block; do that after it",
                ClosedTraceError,
            )
        self._open()
        self._close(None)

    # ------------------------------------------------------------ streaming

    def __aiter__(self) -> TokenStream:
        return TokenStream(self)

    async def _token(self, position: int) -> Token | None:
        """Return a token when it has been made, or None if the generation ends before it."""
        if self._recorder.result is None:
            pending = self._start()
            while position >= len(self._log.tokens) and not self._log.ended:
                self._news.clear()
                with self._awaiting(pending):
                    await self._news.wait()
        if position < len(self._log.tokens):
            return self._log.tokens[position]
        await self._run()
        return None

    def _submit(self) -> Pending:
        pending = super()._submit()
        pending.reply.add_done_callback(self._end)
        return pending

    def _take_tokens(self, event: Generated) -> None:
        self._log.add(event)
        self._news.set()
        count = len(self._log.tokens)
        self._tell(Progress(self._id, "generating", elapsed_s=self._elapsed_s(), tokens=count))

    def _end(self, reply: asyncio.Future[Reply]) -> None:
        if reply.cancelled() or reply.exception() is not None:
            self._log.ended = True
        else:
            self._log.complete(reply.result()[0].completions)
        self._news.set()
