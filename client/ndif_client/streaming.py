"""Tokens of a generation as they are made, each of them once, whatever happens on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from ndif_client.wire.messages import Completion, Generated

if TYPE_CHECKING:
    from ndif_client.generation import Generation


class Token(msgspec.Struct, frozen=True):
    """One generated token.

    Attributes:
        step: that made it, from 0; it is also its place in its sequence.
        sequence: which prompt it follows, counted over all prompts of all invokes.
        id: the token.
        text: what the text of the sequence has grown by; "" while a character is incomplete, or
            while a text of `stop` may have begun.
    """

    step: int
    sequence: int
    id: int
    text: str


class TokenLog:
    """All tokens of a generation so far, in the order they arrived.

    Attributes:
        tokens: they.
        ended: whether no more will come.
    """

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.ended = False
        self._texts: dict[int, list[str]] = {}

    def add(self, event: Generated) -> None:
        """Add what one step has made; what is known already is passed over."""
        for sequence, number, text in zip(event.sequences, event.tokens, event.texts, strict=True):
            if event.step == len(self._texts.get(sequence, ())):
                self._append(sequence, number, text)

    def complete(self, completions: Sequence[Sequence[Completion]]) -> None:
        """Add what the events have not told, from the result; then it has ended."""
        sequences = [completion for invoke in completions for completion in invoke]
        missing = [
            token
            for sequence, completion in enumerate(sequences)
            for token in self._rest(sequence, completion)
        ]
        for token in sorted(missing, key=lambda token: (token.step, token.sequence)):
            self._append(token.sequence, token.id, token.text)
        self.ended = True

    def _rest(self, sequence: int, completion: Completion) -> list[Token]:
        known = self._texts.get(sequence, [])
        left = completion.text[len("".join(known)) :]
        rest = []
        for step in range(len(known), len(completion.ids)):
            text = completion.tokens[step] if left.startswith(completion.tokens[step]) else ""
            if step == len(completion.ids) - 1:
                text = left  # the texts together are always the text of the completion
            left = left[len(text) :]
            rest.append(Token(step, sequence, completion.ids[step], text))
        return rest

    def _append(self, sequence: int, number: int, text: str) -> None:
        texts = self._texts.setdefault(sequence, [])
        self.tokens.append(Token(len(texts), sequence, number, text))
        texts.append(text)


class TokenStream:
    """What `async for` over a generation goes through, from its first token on."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._position = 0

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> Token:
        token = await self._generation._token(self._position)
        if token is None:
            raise StopAsyncIteration
        self._position += 1
        return token
