"""The comparison with peers, with the one of them that our own environment can run: plain hooks."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bench.load.scenarios import SCENARIOS, Request, Sizes
from bench.peers import crowd, solo
from bench.peers.catalogue import PEERS, find
from bench.peers.environments import SCRIPTS, names
from bench.peers.ours import Ours
from bench.peers.process import Answers, PeerError, PeerProcess
from tests.conftest import MakeModel
from tests.integration.server.harness import Server, running

SIZES = Sizes(layers=3, vocabulary=300, prompt_tokens=(4, 6), new_tokens=3)


@pytest.fixture(scope="module")
def folder(model_folder: MakeModel) -> Path:
    return model_folder("llama")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[PeerProcess]:
    peer = PeerProcess(Path(sys.executable), "plain_hooks", str(folder), "float32")
    yield peer
    peer.close()


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(folder, tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.fixture
def ours(server: Server) -> Iterator[Ours]:
    made = Ours(server.url, 3)
    yield made
    made.close()


def test_every_peer_that_runs_has_a_script_and_requirements() -> None:
    for peer in find("all"):
        if peer.script is None:
            assert peer.missing
        else:
            assert (SCRIPTS / f"{peer.script}.py").is_file()
            assert peer.environment in names()
            assert set(peer.scenarios or SCENARIOS) <= set(SCENARIOS)


def test_a_peer_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="no peer 'nnsigt'; there are plain-hooks, nnsight"):
        find("nnsigt")


def test_plain_hooks_and_we_give_equal_answers_in_every_scenario(
    ours: Ours, plain: PeerProcess
) -> None:
    able = {scenario: ["plain-hooks"] for scenario in SCENARIOS}

    figures, seen, notes = solo.measure(ours, {"plain-hooks": plain}, able, SIZES, 1, "float32")

    assert notes == []
    assert len(figures) == len(SCENARIOS)
    assert set(seen) == {f"{scenario}_s" for scenario in SCENARIOS}


class Shifted:
    """A peer whose answers are all a little larger."""

    def __init__(self, peer: PeerProcess) -> None:
        self._peer = peer

    def round(self, requests: Sequence[Request]) -> Answers:
        answers = self._peer.round(requests)
        return Answers(answers.seconds, [[n * 1.01 for n in own] for own in answers.values])


def test_a_peer_that_answers_something_else_gets_no_figure(ours: Ours, plain: PeerProcess) -> None:
    able = {scenario: ["shifted"] for scenario in SCENARIOS}

    figures, _, notes = solo.measure(ours, {"shifted": Shifted(plain)}, able, SIZES, 1, "float32")

    assert "hidden-states: shifted gives another answer than we and the others do" in notes
    assert not any("hidden-states" in figure.name for figure in figures)


def test_users_without_pause_are_measured_on_both(ours: Ours, plain: PeerProcess) -> None:
    subjects: dict[str, crowd.Subject] = {"ours": ours, "plain-hooks": plain}

    figures, seen = crowd.measure(subjects, "hidden-states", SIZES, users=3, seconds=0.2, rounds=1)

    assert len(figures) == 2
    assert all(figure.spread.median > 0 for figure in figures)
    assert set(seen) == {"requests_per_s", "p95_s"}


def test_what_a_peer_can_not_do_is_an_error_with_its_own_words(plain: PeerProcess) -> None:
    with pytest.raises(PeerError, match="no attribute 'dreams'"):
        plain.round([Request(scenario="dreams", tokens=[1])])


def test_a_peer_that_can_not_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="its last words"):
        PeerProcess(Path(sys.executable), "plain_hooks", str(tmp_path), "float32")


def test_all_peers_are_listed_once() -> None:
    assert len({peer.name for peer in PEERS}) == len(PEERS)
