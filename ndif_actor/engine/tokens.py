"""Text to token ids and back, with the tokenizer that lies beside the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ndif_actor.errors import ModelError


class Tokenizer:
    """The tokenizer of a model folder."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Each id is decoded once: a vocabulary fits in a few megabytes.
        self._piece = lru_cache(maxsize=None)(lambda token: str(tokenizer.decode([token])))

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
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{folder} has no tokenizer that can be read: {error}") from error
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with the special tokens the tokenizer adds by itself."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` together."""
        text: str = self._tokenizer.decode(list(ids))
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each id by itself."""
        return [self._piece(token) for token in ids]
