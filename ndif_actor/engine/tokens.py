"""Text to token ids and back, with the tokenizer that lies beside the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from jinja2.exceptions import TemplateError
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from ndif_actor.errors import ModelError, RequestError
from ndif_client.wire.graph import Chat
from ndif_client.wire.messages import Fault

#: What a tokenizer decodes a part of a character to.
_INCOMPLETE = "\ufffd"


class Detokenizer(Protocol):
    """The text of one sequence, token by token; special tokens have none."""

    def add(self, token: int) -> str:
        """Return what the text has grown by; "" while a character is incomplete."""
        ...

    def end(self) -> str:
        """Return what is left when no token follows: a character that stays incomplete."""
        ...


class Tokenizer:
    """The tokenizer of a model folder.

    Attributes:
        eos: ids that end what the model generates; may be empty.
        pad: the id that stands for nothing.
    """

    def __init__(self, tokenizer: Any, eos: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Each id is decoded once: a vocabulary fits in a few megabytes.
        self._piece = lru_cache(maxsize=None)(lambda token: str(tokenizer.decode([token])))
        own = tokenizer.eos_token_id
        self.eos = list(eos) or ([] if own is None else [int(own)])
        pad = tokenizer.pad_token_id
        self.pad = int(pad) if pad is not None else next(iter(self.eos), 0)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer in `folder`; no code of the folder is run.

        Raises:
            ModelError: there is none that can be read.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            return cls(tokenizer, _generation_eos(folder))
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{folder} has no tokenizer that can be read: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with the special tokens the tokenizer adds by itself."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def chat(self, chat: Chat) -> list[int]:
        """Return the ids of a conversation, up to where the model's next turn begins.

        One that ends with the model's own turn ends there: nothing is asked of it.

        Raises:
            RequestError: the model has no chat template, or it refuses the conversation.
        """
        if not self._tokenizer.chat_template:
            raise _refused("the model's tokenizer has no chat template; send a text or token ids")
        messages = [{"role": turn.role, "content": turn.content} for turn in chat.messages]
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=messages[-1]["role"] != "assistant",
                tokenize=True,
                return_dict=False,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise _refused(f"the model's chat template refuses this: {error}") from None
        return ids

    def words(self, text: str) -> list[list[int]]:
        """Return the ids of `text` inside a sentence: after a space, and without one."""
        spaced = text if text[:1].isspace() else f" {text}"
        found = []
        for each in (text, spaced):
            ids = self.continuation(each)
            if ids and ids not in found:
                found.append(ids)
        return found

    def continuation(self, text: str) -> list[int]:
        """Return the ids of `text` by itself, without any special token."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` together."""
        text: str = self._tokenizer.decode(list(ids))
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each id by itself."""
        return [self._piece(token) for token in ids]

    def detokenizer(self) -> Detokenizer:
        """Return what makes the text of a new sequence."""
        if self._tokenizer.is_fast:
            return _FastDetokenizer(self._tokenizer.backend_tokenizer)
        return _SlowDetokenizer(self._tokenizer)


class _FastDetokenizer:
    """The stream of the tokenizers library."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        #: tokens of the character that is incomplete
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        text = self._stream.step(self._tokenizer, token)
        if text is None:
            self._waiting.append(token)
            return ""
        self._waiting = []
        return str(text)

    def end(self) -> str:
        text: str = self._tokenizer.decode(self._waiting, skip_special_tokens=True)
        return text


class _SlowDetokenizer:
    """Decodes the last tokens again and again: how a token reads depends on those before it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        #: tokens whose text is known, a few of them, then tokens of an incomplete character
        self._known: list[int] = []
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        self._waiting.append(token)
        text = self._grown()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._known, self._waiting = self._waiting, []
        return text

    def end(self) -> str:
        return self._grown() if self._waiting else ""

    def _grown(self) -> str:
        before = self._decode(self._known)
        return self._decode(self._known + self._waiting)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _generation_eos(folder: Path) -> list[int]:
    """Return the ids that the model's own settings end a generation at."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return []
    found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    return [found] if isinstance(found, int) else list(found or [])


def _refused(message: str) -> RequestError:
    return RequestError(Fault(kind="graph", message=message))
