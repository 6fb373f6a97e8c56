"""How a sequence ends, and what of its text is told when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndif_actor.coordinator.completions import GrowingCompletion


class Texts:
    """Tokens are positions in a list of texts; "?" is half a character."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts
        self._rest = ""

    def add(self, token: int) -> str:
        text = self._texts[token]
        self._rest = "?" if text == "?" else ""
        return "" if text == "?" else text

    def end(self) -> str:
        return self._rest


def growing(texts: list[str], *, stop: list[str], eos: list[int], most: int) -> GrowingCompletion:
    return GrowingCompletion(
        eos=eos,
        stop=stop,
        max_new_tokens=most,
        stream=Texts(texts),
        pieces=lambda ids: [texts[token] for token in ids],
    )


def run(
    texts: list[str], stop: list[str], eos: list[int] | None = None, most: int = 100
) -> tuple[GrowingCompletion, list[str]]:
    completion = growing(texts, stop=stop, eos=eos or [], most=most)
    told = []
    for token in range(len(texts)):
        told.append(completion.add(token))
        if completion.finish is not None:
            break
    return completion, told


def test_an_end_of_sequence_token_ends_it_and_is_kept() -> None:
    completion, _ = run(["a", "b", "", "c"], [], eos=[2])

    found = completion.completion()
    assert (found.ids, found.text, found.finish) == ([0, 1, 2], "ab", "eos")


def test_it_ends_at_its_length() -> None:
    completion, _ = run(["a", "b", "c"], [], most=2)

    assert completion.completion().finish == "length"
    assert completion.completion().text == "ab"


def test_a_stop_text_is_cut_off_and_never_told_even_over_several_tokens() -> None:
    completion, told = run(["one", " S", "TO", "P two"], ["STOP"])

    assert told == ["one", " ", "", ""]
    found = completion.completion()
    assert (found.text, found.finish, len(found.ids)) == ("one ", "stop", 4)


def test_what_only_began_like_a_stop_text_is_told_later() -> None:
    _, told = run(["ST", "ART"], ["STOP"])

    assert told == ["", "START"]


def test_the_earliest_stop_text_counts() -> None:
    completion, _ = run(["a.b;c"], [";", "."])

    assert completion.completion().text == "a"


def test_an_incomplete_character_is_told_at_the_end() -> None:
    _, told = run(["a", "?"], [], most=2)

    assert told == ["a", "?"]


def test_a_sequence_that_has_ended_takes_nothing_more() -> None:
    completion, _ = run(["a"], [], most=1)

    with pytest.raises(AssertionError):
        completion.add(0)


@given(st.lists(st.text("ab", max_size=3), min_size=1), st.lists(st.text("ab", min_size=1)))
def test_what_was_told_is_the_text_up_to_the_first_stop(texts: list[str], stop: list[str]) -> None:
    completion, told = run(texts, stop, most=len(texts))

    whole = "".join(texts)
    assert completion.completion().text == "".join(told)
    if completion.finish == "stop":
        made = "".join(texts[: len(completion.ids)])
        assert "".join(told) == made[: min(p for s in stop if (p := made.find(s)) >= 0)]
    else:
        assert "".join(told) == whole
        assert not any(text in whole for text in stop)
