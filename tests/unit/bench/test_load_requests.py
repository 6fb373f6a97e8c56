"""Requests of a load test repeat themselves with their seed, and survive a file."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from bench.load.asking import Planned
from bench.load.loops import arrivals
from bench.load.recording import (
    RecordingError,
    check_fit,
    hurried,
    read_recording,
    write_recording,
)
from bench.load.scenarios import MIXTURE, SCENARIOS, Request, Sizes, draw, parse_weights

SIZES = Sizes(layers=3, vocabulary=300, prompt_tokens=(4, 8), new_tokens=5)


def some_arrivals(seed: str, rate: float = 20.0) -> list[Planned]:
    return arrivals(rate, 4, 10.0, lambda rng: draw(MIXTURE, rng, SIZES), seed)


def test_the_same_seed_gives_the_same_requests_at_the_same_times() -> None:
    assert some_arrivals("one") == some_arrivals("one")
    assert some_arrivals("one") != some_arrivals("two")


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    planned = arrivals(200.0, 4, 50.0, lambda rng: Request(scenario="", tokens=[]), "seed")

    gaps = [b.at_s - a.at_s for a, b in pairwise(planned)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(1 / 200, rel=0.05)
    assert variance**0.5 == pytest.approx(mean, rel=0.05)  # as of the exponential distribution
    assert {one.user for one in planned} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_draws_what_the_model_can_be_asked(name: str) -> None:
    rng = random.Random(0)
    for _ in range(50):
        request = draw({name: 1.0}, rng, SIZES)
        check_fit([Planned(0.0, 0, request)], SIZES)
        assert request.scenario == name and request.tokens


def test_a_mixture_is_drawn_by_its_weights() -> None:
    rng, weights = random.Random(0), parse_weights("patching=0.75,steering=0.25,attribution=0")
    names = [draw(weights, rng, SIZES).scenario for _ in range(2000)]

    assert names.count("patching") / 2000 == pytest.approx(0.75, abs=0.05)
    assert "attribution" not in names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lens", "no scenario 'lens'; there are hidden-states"),
        ("patching=0.5,steering=0.2", "add up to 0.7; make them add up to 1"),
        ("patching=half", "is no NAME=WEIGHT"),
        ("patching=2", "is between 0 and 1"),
        ("patching=0.5,patching=0.5", "is there twice"),
        ("patching=nan", "is between 0 and 1"),
    ],
)
def test_weights_that_can_not_be_are_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_weights(text)


def test_the_weights_of_the_mixture_add_up() -> None:
    assert sum(MIXTURE.values()) == pytest.approx(1)
    assert set(MIXTURE) == set(SCENARIOS)


@pytest.mark.parametrize("name", ["run.jsonl", "run.msgpack"])
def test_a_recording_comes_back_as_it_was_written(tmp_path: Path, name: str) -> None:
    planned = some_arrivals("recorded")
    write_recording(tmp_path / name, planned[::-1], "tiny")

    found = read_recording(tmp_path / name)

    assert [one.request for one in found] == [one.request for one in planned]
    assert [one.user for one in found] == [one.user for one in planned]
    assert [one.at_s for one in found] == pytest.approx([one.at_s for one in planned], abs=1e-6)
    assert hurried(found, 2.0)[-1].at_s == pytest.approx(found[-1].at_s / 2)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "ends with .jsonl or .msgpack"),
        ("a.jsonl", b"", "no recording"),
        ("a.jsonl", b'{"version":1}\n', "has no request"),
        ("a.jsonl", b'{"version":9}\n', "version 9"),
        ("a.jsonl", b'{"version":1}\n{"at_s":"x"}\n', "no recording"),
        ("a.msgpack", b"\x80\x04\x95", "no recording"),
    ],
)
def test_a_file_that_is_no_recording_is_refused(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(RecordingError, match=said):
        read_recording(tmp_path / name)


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (Planned(0.0, 0, Request(scenario="patching", tokens=[1], layer=3)), "has 3"),
        (Planned(0.0, 0, Request(scenario="patching", tokens=[1, 300])), "knows 300"),
        (Planned(0.0, 0, Request(scenario="exec", tokens=[1])), "of scenario 'exec'"),
        (Planned(-1.0, 0, Request(scenario="patching", tokens=[1])), "negative"),
    ],
)
def test_a_recording_of_another_model_is_refused_before_it_is_sent(one: Planned, said: str) -> None:
    with pytest.raises(RecordingError, match=said):
        check_fit([one], SIZES)
