"""What a value is, asked of the server while its trace is still being written.

Python wants some things at once: `h.shape[-1]`, `len(h)`, `for row in h`. What has been recorded so
far is sent to be explained, which runs nothing, and whoever writes the trace waits those
milliseconds. What a hook point is follows from what was learnt about another of the same invoke.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ndif_client.errors import ConnectError, ValueUnknownError, graph_error
from ndif_client.explanation import Explanation
from ndif_client.submission import Submitter
from ndif_client.transport import Transport
from ndif_client.values import SAME, Hooked, Value, View, node_of
from ndif_client.wire.graph import PREFILL, Invoke
from ndif_client.wire.messages import TraceRequest, ValueInfo


def explain_now(
    transport: Transport, request: TraceRequest, buffers: Sequence[bytes]
) -> Explanation:
    """Return what a request would cost, before this thread's event loop goes on.

    Raises:
        NdifError: the server refuses it, or can't be reached.
    """

    async def ask() -> Explanation:
        twin = transport.twin()
        await twin.open()
        try:
            return await Submitter(twin).explain(request, buffers)
        finally:
            await twin.close()

    # A loop and a connection of their own: those of the session may be waiting for this very line.
    with ThreadPoolExecutor(1, thread_name_prefix="ndif-client") as thread:
        return thread.submit(asyncio.run, ask()).result()


class Facts:
    """What is known about the values of one trace.

    Args:
        ask: returns shape and dtype of all nodes recorded so far.
    """

    def __init__(self, ask: Callable[[], list[ValueInfo | None]]) -> None:
        self._ask = ask
        self._nodes: list[ValueInfo | None] = []
        #: what the words in the shapes of hook points mean, by invoke
        self._sizes: dict[int, dict[str, int]] = {}

    def of(self, value: Value) -> ValueInfo:
        """Return shape and dtype of a value.

        Raises:
            ValueUnknownError: they are not the same at all of its steps, or can't be found out.
            NdifError: what has been recorded can never run.
        """
        node = node_of(value)
        _check_one_step(value)
        while isinstance(value._origin, View) and value._origin.apply.op == SAME:
            value = value._origin.parent
        place = value._origin if value._recorder.block_of(node).steps == PREFILL else None
        if isinstance(place, Hooked):
            sizes = self._sizes_of(place.invoke, value._recorder.invokes)
            known = [sizes.get(s) if isinstance(s, str) else s for s in place.info.shape]
            if None not in known:
                return ValueInfo([size for size in known if size is not None], place.info.dtype)
        if node >= len(self._nodes) or self._nodes[node] is None:
            self._learn()
        found = self._nodes[node] if node < len(self._nodes) else None
        if found is None:
            raise _unknown("nobody knows its shape")
        if isinstance(place, Hooked):
            self._note(place, found)
        return found

    def _learn(self) -> None:
        try:
            self._nodes = self._ask()
        except ConnectError as error:
            raise _unknown(f"its shape is asked of the server, and {error}") from error

    def _sizes_of(self, invoke: int, invokes: Sequence[Invoke]) -> dict[str, int]:
        """Return the sizes of an invoke; where its prompts are ids, they are known at once."""
        if invoke not in self._sizes:
            prompts = invokes[invoke].prompts
            lengths = [len(prompt) for prompt in prompts if isinstance(prompt, list)]
            known = self._sizes[invoke] = {"batch": len(prompts)}
            if len(lengths) == len(prompts) and not invokes[invoke].decoder:
                known["sequence"] = max(lengths)
        return self._sizes[invoke]

    def _note(self, place: Hooked, found: ValueInfo) -> None:
        sizes = self._sizes[place.invoke]
        for word, size in zip(place.info.shape, found.shape, strict=True):
            if isinstance(word, str):
                sizes[word] = size


def facts_of(value: Value) -> ValueInfo:
    """Return shape and dtype of a value; raises as `Facts.of` does."""
    facts = value._recorder.facts
    if facts is None or value._recorder.closed_at is not None:
        raise _unknown("its shape is known only where a trace with prompts is being written")
    return facts.of(value)


def _check_one_step(value: Value) -> None:
    """Refuse a value of several steps of a generation, whose sequence is not always as long."""
    recorder = value._recorder
    steps = recorder.block_of(value._node).steps
    if steps.single or not (0 in steps or recorder.attends_at(steps)):
        return
    raise _unknown(
        f"it is about {steps}, and need not have one shape at all of them; count from the end, or "
        "take sizes of session.tree"
    )


def _unknown(why: str) -> ValueUnknownError:
    error = graph_error(f"this value is computed later, on the server: {why}", ValueUnknownError)
    assert isinstance(error, ValueUnknownError)
    return error
