"""One user who saves many activations at once, in a process of their own."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import msgspec

from bench.load.loopback import receive


class Collected(msgspec.Struct, frozen=True):
    """What one request brought.

    Attributes:
        num_bytes: of all saved values.
        seconds: from before the experiment is written until all values are arrays.
        forward_s: the forward, as the server measured it, with the copies of what is saved.
    """

    num_bytes: int
    seconds: float
    forward_s: float


class Collector:
    """A user connected to one server.

    Args:
        url: of the server.
        num_bytes: how much to save, at least, where much is saved.
    """

    def __init__(self, url: str, num_bytes: int) -> None:
        from ndif_client import connect

        self._loop = asyncio.new_event_loop()
        self._session: Any = self._loop.run_until_complete(_connected(connect(url)))
        self._num_bytes = num_bytes

    def save_embeddings(self, tokens: int, whole: bool) -> Collected:
        """Save the output of the embedding, after which the forward ends, many times over.

        Args:
            tokens: length of the prompt.
            whole: or else a single number of it, once.
        """
        row_bytes = self._row_bytes()
        copies = -(-self._num_bytes // (tokens * row_bytes))

        def write(model: Any) -> list[Any]:
            if not whole:
                return [model.model.embed_tokens.output[:, -1, 0]]
            return [model.model.embed_tokens.output for _ in range(copies)]

        return self._loop.run_until_complete(self._save(tokens, write))

    def save_every_layer(self) -> Collected:
        """Save the output of every layer, for a prompt of as many tokens as that takes."""
        layers = self._session.tree.num_layers
        tokens = -(-self._num_bytes // (layers * self._row_bytes()))

        def write(model: Any) -> list[Any]:
            return [layer.output for layer in model.model.layers]

        return self._loop.run_until_complete(self._save(tokens, write))

    def fetch(self, port: int) -> float:
        """Fetch as many bytes through a plain socket; return the seconds."""
        return receive(port, self._num_bytes)

    def close(self) -> None:
        """Close the session."""
        self._loop.run_until_complete(self._session.close())
        self._loop.close()

    def _row_bytes(self) -> int:
        """Return the bytes of one token in the residual stream."""
        from ndif_client.wire.tensors import ITEM_BYTES

        tree = self._session.tree
        return int(tree.hidden_size * ITEM_BYTES[tree.dtype])

    async def _save(self, tokens: int, write: Callable[[Any], list[Any]]) -> Collected:
        vocabulary = self._session.tree.vocab_size
        ids = random.Random(0).choices(range(vocabulary), k=tokens)
        began = time.perf_counter()
        trace = self._session.trace(ids)
        with trace:
            trace.saved_rows = write(self._session.model)
        result = await trace
        arrays = result["saved_rows"]
        seconds = time.perf_counter() - began
        num_bytes = sum(array.nbytes for array in arrays)
        return Collected(num_bytes, seconds, result.statistics.forward_s)


async def _connected(connecting: Any) -> Any:
    return await connecting
