"""What becomes of each sequence of a generation: its tokens, its text, and when it has ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal, Protocol

from ndif_client.wire.messages import Completion

Finish = Literal["length", "eos", "stop", "condition"]


class TextStream(Protocol):
    """Tokens to text, piece by piece; special tokens have none."""

    def add(self, token: int) -> str:
        """Return what the text has grown by; "" while a character is incomplete."""
        ...

    def end(self) -> str:
        """Return what is left when no token follows."""
        ...


class GrowingCompletion:
    """One sequence while it is generated.

    Args:
        eos: ids that end it.
        stop: texts that end it.
        max_new_tokens: its length at most.
        stream: makes its text.
        pieces: returns the text of each id by itself.

    Attributes:
        ids: its tokens so far.
        finish: why it has ended, or None while it goes on.
    """

    def __init__(
        self,
        *,
        eos: Collection[int],
        stop: Sequence[str],
        max_new_tokens: int,
        stream: TextStream,
        pieces: Callable[[Sequence[int]], list[str]],
    ) -> None:
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self._eos = frozenset(eos)
        self._stop = tuple(stop)
        self._max_new_tokens = max_new_tokens
        self._stream = stream
        self._pieces = pieces
        self._texts: list[str] = []
        #: text that may be the beginning of a stop text
        self._held = ""

    def add(self, token: int, *, is_last: bool = False) -> str:
        """Take the next token in; return what the text has certainly grown by.

        Args:
            token: its id.
            is_last: a condition of the request ends the sequence with it.
        """
        assert self.finish is None, "a sequence that has ended gets no more tokens"
        self.ids.append(token)
        text = self._held + self._stream.add(token)
        if token in self._eos:
            self.finish = "eos"
        elif len(self.ids) >= self._max_new_tokens:
            self.finish = "length"
        elif is_last:
            self.finish = "condition"
        if self.finish is not None:
            text += self._stream.end()
        place = min((p for p in (text.find(stop) for stop in self._stop) if p >= 0), default=-1)
        if place >= 0:
            self._held, text = "", text[:place]
            self.finish = "eos" if self.finish == "eos" else "stop"
        elif self.finish is None:
            certain = len(text) - self._could_begin_a_stop(text)
            self._held, text = text[certain:], text[:certain]
        self._texts.append(text)
        return text

    def completion(self) -> Completion:
        """Return what has been generated: all of it, or what there was when its request failed."""
        text = "".join(self._texts)
        if self.finish is None:
            text += self._held + self._stream.end()
        return Completion(self.ids, self._pieces(self.ids), text, self.finish or "failed")

    def _could_begin_a_stop(self, text: str) -> int:
        """Return how many characters at the end of `text` a stop text may begin with."""
        longest = max(map(len, self._stop), default=1) - 1
        return next(
            (
                count
                for count in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-count:]) for stop in self._stop)
            ),
            0,
        )
