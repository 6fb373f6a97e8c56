"""How tokens are chosen: what a user may say, and what is refused before anything is sent."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ndif_client import Session
from ndif_client.errors import GraphError
from ndif_client.wire.graph import Chat, Message
from ndif_client.wire.messages import Decoding


def _decoding(session: Session, **options: Any) -> Decoding:
    return session.generate("x", **options)._decoding


def test_by_default_the_most_likely_tokens_are_taken(session: Session) -> None:
    decoding = _decoding(session, seed=5)

    assert decoding == Decoding(max_new_tokens=20, seed=5)


def test_a_seed_nobody_gave_is_drawn_and_shown(session: Session) -> None:
    one, other = session.generate("x"), session.generate("x")

    assert one.seed == one._decoding.seed != other.seed
    assert session.generate("x", seed=1).seed == 1


@pytest.mark.parametrize("option", [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_an_option_that_only_sampling_has_turns_it_on_unless_a_temperature_is_given(
    session: Session, option: dict[str, Any]
) -> None:
    assert _decoding(session, **option).temperature == 1.0
    assert _decoding(session, temperature=0.0, **option).temperature == 0.0
    assert _decoding(session, temperature=0.3, **option).temperature == 0.3


@pytest.mark.parametrize(
    ("option", "given", "sent"),
    [
        ("stop", "\n", ["\n"]),
        ("stop", ["a", "b"], ["a", "b"]),
        ("stop", (), []),
        ("eos", None, None),
        ("eos", False, []),
        ("eos", [], []),
        ("eos", 7, [7]),
        ("eos", (7, 8), [7, 8]),
        ("eos", np.int64(8), [8]),
        ("bad_words", "no", ["no"]),
        ("bad_words", ["no", [1, 2], np.array([3])], ["no", [1, 2], [3]]),
        ("logit_bias", {np.int64(1): 2}, {1: 2.0}),
        ("logit_bias", {1: -math.inf}, {1: -math.inf}),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", torch.tensor(0.5), 0.5),
        ("max_new_tokens", np.int64(3), 3),
    ],
    ids=repr,
)
def test_options_take_what_is_natural(session: Session, option: str, given: Any, sent: Any) -> None:
    assert getattr(_decoding(session, **{option: given}), option) == sent


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("min_new_tokens", 21),
        ("temperature", -1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 1 << 62),
        ("stop", 5),
        ("stop", [""]),
        ("stop", ["x"] * 65),
        ("eos", True),
        ("eos", "</s>"),
        ("eos", [-1]),
        ("bad_words", [5]),
        ("logit_bias", [1]),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: math.nan}),
        ("numerics", "exact"),
    ],
    ids=str,
)
def test_a_value_that_can_not_be_is_refused_with_its_name_and_line(
    session: Session, option: str, value: Any
) -> None:
    with pytest.raises(GraphError, match=option) as refused:
        session.generate("x", **{option: value})

    assert "test_decoding.py" in str(refused.value)


# ---------------------------------------------------------------- conversations

HELLO = [{"role": "user", "content": "Hello"}]


def test_messages_are_a_conversation_or_several(session: Session) -> None:
    one = session.generate(messages=HELLO)
    several = session.trace(messages=[HELLO, [*HELLO, {"role": "assistant", "content": "Hi"}]])

    hello = Message("user", "Hello")
    assert one._recorder.invokes[0].prompts == [Chat([hello])]
    assert several._recorder.invokes[0].prompts == [
        Chat([hello]),
        Chat([hello, Message("assistant", "Hi")]),
    ]


def test_an_invoke_takes_messages_too(session: Session, model: Any) -> None:
    with session.trace() as trace, trace.invoke(messages=HELLO):
        model.lm_head.output.save()
    trace._recorder.failure = RuntimeError("only recorded")

    assert trace._recorder.invokes[0].prompts == [Chat([Message("user", "Hello")])]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hello",
        [[]],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": "x", "name": "me"}],
        ["Hello"],
        [HELLO, "Hello"],
        HELLO[0],
    ],
    ids=str,
)
def test_anything_else_is_no_conversation(session: Session, messages: Any) -> None:
    with pytest.raises(GraphError):
        session.trace(messages=messages)


def test_a_prompt_and_messages_together_are_refused(session: Session) -> None:
    with pytest.raises(GraphError, match="not both"):
        session.generate("x", messages=HELLO)
