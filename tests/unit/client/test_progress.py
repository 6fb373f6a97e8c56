"""The progress line: one for each trace under way, gone with the last."""

from __future__ import annotations

import pytest

from ndif_client.progress import Progress, ProgressDisplay


def test_nothing_is_shown_before_the_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressDisplay().close()

    assert capsys.readouterr() == ("", "")


def test_a_finished_trace_leaves_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    display = ProgressDisplay()
    display.show(Progress("abcdefgh1234", "queued", position=2))
    display.show(Progress("zzzzzzzz1234", "queued", position=3))
    display.show(Progress("abcdefgh1234", "running", groups=4))
    display.show(Progress("abcdefgh1234", "done"))
    display.show(Progress("zzzzzzzz1234", "failed"))

    shown = capsys.readouterr()
    assert shown.out == ""
    assert "trace abcdefgh  done" in shown.err
    assert "trace zzzzzzzz  failed" in shown.err
    assert display._bars is None


@pytest.mark.parametrize(("tokens", "words"), [(1, "1 token"), (12, "12 tokens")])
def test_a_generation_shows_how_many_tokens_it_has(tokens: int, words: str) -> None:
    display = ProgressDisplay()
    display.show(Progress("abcdefgh1234", "generating", tokens=tokens))
    assert display._bars is not None
    (task,) = display._bars.tasks
    display.close()

    assert task.description == f"trace abcdefgh  generating, {words}"
