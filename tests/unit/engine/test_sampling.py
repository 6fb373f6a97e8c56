"""Tokens are chosen as transformers' `generate` would, with noise of the request's own."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from ndif_actor.engine.sampling import Sampler, choose_all
from ndif_client.wire.messages import Decoding

CPU = torch.device("cpu")
VOCABULARY = 12


def sampler(sequence: int = 0, prompt_length: int = 2, **options: Any) -> Sampler:
    return Sampler(Decoding(max_new_tokens=8, **options), sequence, prompt_length, CPU)


def chosen(logits: list[float], ids: list[int], step: int = 0, **options: Any) -> int:
    return int(sampler(**options).choose(torch.tensor(logits), ids, step))


def test_without_a_temperature_the_largest_logit_wins() -> None:
    assert chosen([0.0, 3.0, 1.0], [0, 0]) == 1
    assert sampler().takes_the_largest
    assert not sampler(temperature=1.0).takes_the_largest
    assert not sampler(repetition_penalty=2.0).takes_the_largest


def test_a_repeated_token_pays_its_penalty() -> None:
    assert chosen([0.0, 3.0, 2.0], [1, 0], repetition_penalty=2.0) == 2


def test_a_biased_token_gets_its_bias() -> None:
    assert chosen([0.0, 3.0, 2.0], [1, 0], logit_bias={0: 5.0}) == 0


def test_bad_words_are_not_completed() -> None:
    words = [[1], [0, 2]]

    assert chosen([1.0, 3.0, 2.0], [1, 0], bad_words=words) == 0
    assert chosen([1.0, 3.0, 2.0], [0, 1], bad_words=words) == 2


def test_a_sequence_does_not_end_before_its_shortest_length() -> None:
    options = {"min_new_tokens": 2, "eos": [1]}

    assert chosen([1.0, 3.0, 2.0], [0, 0], **options) == 2
    assert chosen([1.0, 3.0, 2.0], [0, 0, 2, 2], **options) == 1


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {2, 3}),
        ({"top_p": 0.6}, {3}),
        ({"min_p": 0.3}, {2, 3}),
        ({"temperature": 0.01}, {3}),
    ],
)
def test_samples_come_from_what_the_settings_leave(
    options: dict[str, Any], possible: set[int]
) -> None:
    logits = [0.0, 1.0, 2.0, 3.0]
    settings = {"temperature": 1.0, **options}

    seen = {chosen(logits, [0], step, **settings) for step in range(200)}

    assert seen == possible


def test_samples_are_as_frequent_as_their_probabilities() -> None:
    logits = [0.0, 1.0, 2.0]

    counts = Counter(chosen(logits, [0], step, temperature=1.0, seed=5) for step in range(3000))

    for token, probability in enumerate(torch.tensor(logits).softmax(-1).tolist()):
        assert abs(counts[token] / 3000 - probability) < 0.04


def test_noise_depends_on_seed_sequence_and_step_alone() -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0))

    def tokens(seed: int, sequence: int) -> list[int]:
        own = sampler(sequence, temperature=2.0, seed=seed)
        return [int(own.choose(logits, [1], step)) for step in range(20)]

    assert tokens(1, 0) == tokens(1, 0)
    assert len({tuple(tokens(seed, sequence)) for seed in (1, 2) for sequence in (0, 1)}) == 4


def test_each_row_is_chosen_by_its_own_settings() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0], [float("nan")] * 3])
    own = [sampler(), sampler(logit_bias={1: -9.0}), sampler(temperature=1.0)]

    found = choose_all(own, logits, [[0], [0], [0]], [0, 0, 0]).tolist()

    assert found[:2] == [1, 2]
    assert 0 <= found[2] < 3, "even NaN must give an id that exists"
