"""A session with one server: its model, traces on it, its tokenizer."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from copy import copy
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ndif_client.envoy import Envoy
from ndif_client.errors import NoValueError
from ndif_client.explanation import Explanation
from ndif_client.generation import Generation
from ndif_client.held import Handle, Holder, name_of
from ndif_client.progress import OnProgress, Progress, ProgressDisplay
from ndif_client.prompts import Messages, Prompt, as_ids
from ndif_client.recording import TraceFunction
from ndif_client.submission import Submitter
from ndif_client.trace import Trace
from ndif_client.transport import Transport, quoted
from ndif_client.wire.messages import (
    DetokenizeRequest,
    HeldSpec,
    ModelList,
    ModelSummary,
    ModelTree,
    Numerics,
    TokenizeReply,
    TokenizeRequest,
)
from ndif_client.wire.tensors import ArrayKind

if TYPE_CHECKING:
    from ndif_client.chain import Chain
    from ndif_client.edits import Edit, EditRecording, Edits

#: Seconds that dropping what is held may take while the session closes.
_DROP_S = 2.0


class Session:
    """An open connection to a server and one of its models. Made by `connect`.

    Attributes:
        tree: the model as data: layers, sizes, hook points.
        model: the model to write experiments on; `print(session.model)` shows it.
    """

    def __init__(self, transport: Transport, tree: ModelTree, tensors: ArrayKind) -> None:
        self.tree = tree
        self.model = Envoy(tree.root, forwards=tree.forwards)
        self._edits: Edits | None = None
        self._transport = transport
        self._holder = Holder(transport)
        self._tidying: set[asyncio.Task[None]] = set()
        self._tensors: ArrayKind = tensors
        self._submitter = Submitter(transport)
        self._display = ProgressDisplay()
        #: whether the connection belongs to another session
        self._shares = False
        self._resources = AsyncExitStack()

    def trace(
        self,
        prompt: Prompt | None = None,
        function: TraceFunction | None = None,
        *,
        messages: Messages | None = None,
        decoder: Prompt | None = None,
        numerics: Numerics = "fast",
        seed: int | None = None,
        on_progress: OnProgress | None = None,
        progress: bool = False,
    ) -> Trace:
        """Open an experiment.

        Args:
            prompt: a text, token ids, or a list of either (one batch); leave it out to give
                prompts by `trace.invoke(...)`.
            function: called at once with the model; every value it returns, alone or in a list or
                dict, is saved under its name there.
            messages: in the place of a prompt, a conversation: a list of `{"role": ..., "content":
                ...}`, or a list of such lists (one batch). The model's own chat template makes the
                prompt of it, on the server.
            decoder: of a model with an encoder and a decoder (T5, BART, ...), what the decoder
                reads beside each prompt: texts, to which the token is added that every decoder
                begins with, or token ids, taken as they are. By default that token alone.
            numerics: "fast" shares forwards with others, so values may differ by rounding; "solo"
                takes every forward for itself, and values are the same whoever else is there.
            seed: of the random operations (`ops.randn`, `.dropout`, ...), from 0 to 2**62 - 1: they
                draw what torch draws on a CPU after `torch.manual_seed(seed)`. By default one is
                drawn; `seed` of the trace is the one it has.
            on_progress: called with a `Progress` at every step.
            progress: show a line on the terminal, or in the notebook, while it is under way.

        Returns:
            The trace: a context manager (`with` records, `async with` also runs) that can be
            awaited once it is recorded, also many at once with `asyncio.gather`.

        Raises:
            GraphError: an argument has a value that it can't have; nothing was sent.

        Example:
            async with session.trace("The Eiffel Tower is in") as trace:
                hidden = session.model.model.layers[3].output.save()
            hidden.value
        """
        return Trace(
            self,
            prompt,
            function,
            messages=messages,
            decoder=decoder,
            numerics=numerics,
            seed=seed,
            on_progress=self._shown(on_progress, progress),
        )

    def generate(
        self,
        prompt: Prompt | None = None,
        function: TraceFunction | None = None,
        *,
        messages: Messages | None = None,
        max_new_tokens: int = 20,
        min_new_tokens: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        eos: int | Sequence[int] | bool | None = None,
        bad_words: str | Sequence[str | Sequence[int]] = (),
        logit_bias: Mapping[int, float] | None = None,
        numerics: Numerics = "fast",
        on_progress: OnProgress | None = None,
        progress: bool = False,
    ) -> Generation:
        """Let the model go on after prompts, and read and change it meanwhile.

        Args:
            prompt, function, messages, numerics, on_progress, progress: as in `trace`.
            max_new_tokens: of each sequence.
            min_new_tokens: before them, no end-of-sequence token is chosen.
            temperature: 0 takes the most likely token, above it tokens are sampled. By default 0,
                or 1 where `top_k`, `top_p` or `min_p` is given.
            top_k: sample only from so many of the most likely tokens.
            top_p: sample only from the most likely tokens that have this probability together.
            min_p: sample only from tokens of at least this share of the likeliest's probability.
            repetition_penalty: divides (or multiplies, if negative) logits of tokens seen before.
            seed: of the sampling, from 0 to 2**62 - 1; the same seed gives the same tokens. By
                default one is drawn; `seed` of the generation is the one it has.
            stop: a text that ends a sequence when it appears in what was generated, or several.
            eos: ids that end a sequence; None for the model's own, False or [] for none.
            bad_words: what must not be generated, texts or lists of token ids.
            logit_bias: what to add to the logits of token ids.

        Returns:
            The generation: a context manager that records (`async with` also runs it), to be
            awaited for its result, or streamed by `async for token in gen`. Where nothing is to be
            recorded, no block is needed.

        Raises:
            GraphError: an argument has a value that it can't have; nothing was sent.

        Example:
            async with session.generate("Once upon", max_new_tokens=50) as gen:
                with gen.all():
                    last = session.model.model.layers[3].output[:, -1].save()
            print(gen.result.text, len(last.value))
        """
        return Generation(
            self,
            prompt,
            function,
            {
                "max_new_tokens": max_new_tokens,
                "min_new_tokens": min_new_tokens,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "seed": seed,
                "stop": stop,
                "eos": eos,
                "bad_words": bad_words,
                "logit_bias": logit_bias,
            },
            messages=messages,
            numerics=numerics,
            on_progress=self._shown(on_progress, progress),
        )

    def chain(self) -> Chain:
        """Open a chain of traces, which are sent together and run one after another.

        Example:
            async with session.chain() as chain:
                for batch in batches:
                    with chain.trace(batch) as trace:
                        ...
                        new.keep("weights")  # and the next one uses session.held("weights")
        """
        from ndif_client.chain import Chain

        return Chain(self)

    # ------------------------------------------------------------ held values
    # What uploading needs is imported when something is uploaded: importing the client is quick.

    def held(self, name: str) -> Handle:
        """Return what stands, in the traces of this session, for the value held as `name`.

        Whether there is one is found out when a trace that uses it is sent.

        Raises:
            GraphError: that can't be a name.
        """
        return self._holder.handle(name)

    async def held_values(self) -> dict[str, HeldSpec]:
        """Return what the server holds for this session: dtype and shape, by name."""
        return (await self._holder.values()).held

    async def drop(self, *handles: Handle | str) -> None:
        """Have the server let go of held values at once.

        Raises:
            NoValueError: one of them was not held.
        """
        names = [name_of(handle) for handle in handles]
        dropped = (await self._holder.drop(names)).held
        absent = [name for name in names if name not in dropped]
        if absent:
            raise NoValueError(f"nothing was held as {', '.join(map(repr, absent))}")

    async def fetch(self, handle: Handle | str) -> Any:
        """Return a held value: a tensor or array, or a tuple of them.

        Raises:
            GraphError: nothing is held as that.
        """
        from ndif_client import uploads

        return (await uploads.fetch(self, [name_of(handle)])).result[0]

    async def upload(self, array: Any, name: str | None = None) -> Handle:
        """Have the server hold a copy of an array or tensor.

        What is held already, with the same content, is not sent again.

        Args:
            array: a numpy array or torch tensor.
            name: `session.held(name)` finds it again; by default it has none, and stays as long as
                the handle does.

        Raises:
            GraphError: it can't be uploaded, or have that name.
            LimitError: it is larger than the server takes, or holds for one user.
        """
        from ndif_client import uploads

        return await uploads.upload(self, array, name)

    async def upload_file(
        self, path: str | os.PathLike[str], prefix: str | None = None
    ) -> dict[str, Handle]:
        """Have the server hold the tensors of a safetensors file.

        Args:
            path: of the file.
            prefix: the tensors are held under this and their names in the file; by default they
                have no names, and stay as long as their handles do.

        Returns:
            What stands for each, by its name in the file.

        Raises:
            OSError, TensorFileError: the file can't be read.
            LimitError: there is more than the server takes, or holds for one user.
        """
        from ndif_client import uploads

        return await uploads.upload_file(self, path, prefix)

    async def download(
        self, handles: Mapping[str, Handle | str], path: str | os.PathLike[str]
    ) -> None:
        """Write held values to a safetensors file, which appears when it is complete.

        Args:
            handles: what to write, by the names that it is to have in the file.
            path: of the file; one that is there is replaced.

        Raises:
            OSError, TensorFileError: the file can't be written.
            GraphError: one of them is not held.
        """
        from ndif_client import uploads

        await uploads.download(self, handles, path)

    def _drop_abandoned(self) -> None:
        """Let go of values that nobody has a handle for, by the way."""
        if self._holder.has_abandoned:
            task = asyncio.get_running_loop().create_task(self._holder.drop_abandoned())
            self._tidying.add(task)
            task.add_done_callback(self._tidying.discard)

    # ------------------------------------------------------------ the rest

    async def explain(self, trace: Trace) -> Explanation:
        """Return what a trace or generation would cost, without running it; print it to read it.

        Raises:
            ClosedTraceError: it was submitted already.
            NdifError: the server refuses it, or can't be reached.
        """
        return await trace.explain()

    @property
    def edits(self) -> Edits:
        """The changes of the model that every later trace and generation has."""
        if self._edits is None:
            from ndif_client.edits import Edits

            self._edits = Edits()
        return self._edits

    def edit(self, name: str) -> EditRecording:
        """Record a change of the model that is to apply to later traces.

        Args:
            name: what it is called.

        Returns:
            A block; its value is the edit, to be given to `session.edits.add` or `with_edits`.

        Example:
            with session.edit("quiet") as quiet:
                session.model.layers[3].mlp.output *= 0
            session.edits.add(quiet)
        """
        from ndif_client.edits import EditRecording

        return EditRecording(name, self.tree, self._holder)

    def with_edits(self, *edits: Edit) -> Session:
        """Return another handle of this session, with these edits besides its own.

        It shares the connection, and ends with this one; traces of this one are not edited.
        """
        from ndif_client.edits import Edits

        other = copy(self)
        other._edits = Edits((*self.edits, *edits))
        other._resources = AsyncExitStack()
        other._shares = True
        return other

    async def tokenize(self, text: str) -> TokenizeReply:
        """Return how the model's tokenizer splits a text: `ids`, and the text of each."""
        path = f"/v1/models/{quoted(self.tree.id)}/tokenize"
        return await self._transport.post(path, TokenizeRequest(text), TokenizeReply)

    async def decode(self, ids: Any) -> str:
        """Return the text of token ids: a number, a list of them, or an array or tensor."""
        path = f"/v1/models/{quoted(self.tree.id)}/detokenize"
        reply = await self._transport.post(path, DetokenizeRequest(as_ids(ids)), TokenizeReply)
        return reply.text

    @property
    def url(self) -> str:
        """Where the server is; others can connect there too, even to a private one."""
        return self._transport.url

    async def models(self) -> list[ModelSummary]:
        """Return the models this server offers."""
        return (await self._transport.get("/v1/models", ModelList)).data

    async def close(self) -> None:
        """Cancel what is under way, drop what is held, close all connections.

        A private server is stopped.
        """
        if self._shares:
            return
        self._display.close()
        tidying = list(self._tidying)
        for task in tidying:
            task.cancel()
        try:
            await asyncio.gather(*tidying, return_exceptions=True)
            await self._submitter.close()
            if self._holder.has_kept:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_DROP_S):
                        await self._holder.drop_all()
        finally:
            await self._resources.aclose()

    def _shown(self, on_progress: OnProgress | None, progress: bool) -> OnProgress | None:
        return _both(on_progress, self._display.show) if progress else on_progress

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        tree = self.tree
        return f"Session({self._transport.url}, model={tree.id!r}, {tree.kind}, {tree.dtype})"


def _both(first: OnProgress | None, second: OnProgress) -> OnProgress:
    def tell(progress: Progress) -> None:
        if first is not None:
            first(progress)
        second(progress)

    return tell
