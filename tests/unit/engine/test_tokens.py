"""Text to token ids and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from ndif_actor.engine.tokens import Tokenizer
from ndif_actor.errors import ModelError
from tests.models import make_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    make_tokenizer().save_pretrained(tmp_path)
    return Tokenizer.load(tmp_path)


def test_text_survives_the_way_to_ids_and_back(tokenizer: Tokenizer) -> None:
    text = "Ein Öl-Fass, 3 €"

    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_id_has_a_text_of_its_own(tokenizer: Tokenizer) -> None:
    assert tokenizer.pieces(tokenizer.encode("a b")) == ["a", " ", "b"]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no tokenizer that can be read"):
        Tokenizer.load(tmp_path)
