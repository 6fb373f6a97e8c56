"""What is made of the record of a load test: thresholds, comparisons, a page, a fitted cost."""

from __future__ import annotations

import io
import sys
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from bench.load.cli import run_command
from bench.load.compare import differences, print_comparison, slowdown
from bench.load.fitting import fit_run
from bench.load.page import html_page
from bench.load.plots import PlotError, draw_plots
from bench.load.run import RunError, read_run, without_requests, write_run
from bench.load.table import print_run, warnings
from bench.load.thresholds import Thresholds
from bench.simulation.cost import ForwardCost, Load
from tests.unit.bench.load_runs import level, row, run

QUICK = run(level([row(0.1 * n, 0.5) for n in range(50)], users=4))
SLOW = run(level([row(0.1 * n, 1.0) for n in range(50)], users=4), seed=1)
BROKEN = run(level([row(0.0, 0.1, status="internal", error="<b>oh</b> [red]")], users=4))


def printed(write: object, *arguments: object) -> str:
    out = io.StringIO()
    write(Console(file=out, width=100), *arguments)  # type: ignore[operator]
    return out.getvalue()


@pytest.mark.parametrize(
    ("bounds", "missed"),
    [
        (Thresholds(), 0),
        (Thresholds(max_p95=0.6, min_throughput=4.9, max_errors=0), 0),
        (Thresholds(max_p95=0.4), 1),
        (Thresholds(max_p50=0.4, max_p99=0.4, min_goodput=50), 3),
    ],
)
def test_a_threshold_is_missed_exactly_when_the_figure_is_beyond_it(
    bounds: Thresholds, missed: int
) -> None:
    assert len(bounds.missed(QUICK.levels)) == missed


def test_a_load_without_results_meets_no_bound_of_a_time() -> None:
    assert Thresholds(max_p95=1e9).missed(BROKEN.levels) == [
        "4 users: no result, at most 1e+09 s wanted"
    ]
    assert Thresholds(max_errors=0).missed(BROKEN.levels) == ["4 users: 1 errors, at most 0 wanted"]


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_run(tmp_path / "run.json", QUICK)
    assert read_run(tmp_path / "run.json") == QUICK

    write_run(tmp_path / "short.json", without_requests(QUICK))
    short = read_run(tmp_path / "short.json")
    assert short.levels[0].requests is None
    assert short.levels[0].summary == QUICK.levels[0].summary


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"levels": []}', b"\x80\x04"])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(RunError, match="no record"):
        read_run(tmp_path / "run.json")


def test_a_record_of_another_version_is_refused_by_its_number(tmp_path: Path) -> None:
    write_run(tmp_path / "run.json", msgspec.structs.replace(QUICK, version=99))
    with pytest.raises(RunError, match="version 99"):
        read_run(tmp_path / "run.json")


def test_a_comparison_shows_the_change_and_what_else_differed() -> None:
    text = printed(print_comparison, QUICK, SLOW)

    assert "+100%" in text
    assert differences(QUICK, SLOW) == ["settings: seed was 0, is 1"]
    assert slowdown(QUICK, SLOW) == pytest.approx(2)


def test_runs_of_different_loads_are_not_compared() -> None:
    other = run(level([row(0.0, 0.1)], users=5))
    with pytest.raises(RunError, match="no load in common"):
        print_comparison(Console(file=io.StringIO()), QUICK, other)


def test_the_comparison_fails_when_p95_has_grown_too_much(tmp_path: Path) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    write_run(before, QUICK)
    write_run(after, SLOW)

    assert run_command(["compare", str(before), str(after), "--max-slowdown", "2.1"]) == 0
    assert run_command(["compare", str(before), str(after), "--max-slowdown", "1.5"]) == 1
    assert run_command(["compare", str(before), str(tmp_path / "none.json")]) == 2


class _Sources(HTMLParser):
    """Collects the tags of a page and whatever it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_no_other_file_and_shows_text_as_text() -> None:
    page = html_page(BROKEN, draw_plots(BROKEN), ["4 users: too slow"])

    found = _Sources()
    found.feed(page)
    assert len(found.references) == 4
    assert all(each.startswith("data:image/png;base64,") for each in found.references)
    assert not {"script", "link", "b"} & set(found.tags)
    assert "&lt;tiny&gt;" in page and "4 users: too slow" in page


def test_a_machine_that_is_not_quiet_is_told() -> None:
    noisy = msgspec.structs.replace(QUICK.levels[0], busy_before=1.5)

    assert warnings(QUICK) == []
    assert "something else used 1.5 cores" in warnings(run(noisy))[0]


def test_messages_of_errors_are_shown_as_they_are() -> None:
    assert warnings(BROKEN) == [
        "4 users: without a result 1 internal",
        "4 users: 1 x <b>oh</b> [red]",
    ]
    assert "<b>oh</b> [red]" in printed(print_run, BROKEN)


def test_a_record_is_shown_again_with_its_page(tmp_path: Path) -> None:
    write_run(tmp_path / "run.json", without_requests(QUICK))
    arguments = ["report", str(tmp_path / "run.json"), "--html", str(tmp_path / "run.html")]

    assert run_command(arguments) == 0
    assert "data:image/png" in (tmp_path / "run.html").read_text(encoding="utf-8")


def test_without_matplotlib_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r"pip install 'ndif-actor\[bench\]'"):
        draw_plots(QUICK)

    assert run_command(["load", "http://127.0.0.1:1", "--users", "1"]) == 2
    assert "--no-plots" in capsys.readouterr().err


def test_the_cost_of_forwards_is_found_again_from_what_a_run_has_seen() -> None:
    cost = ForwardCost(base_s=0.01, weights_s=0.0, row_s=1e-4, request_s=2e-3)
    rows = [
        row(
            0.0,
            1.0,
            forward=number,
            forwards=1,
            rows=40 * number,
            groups=1 + number % 5,
            run_s=cost.seconds(Load(40 * number, 1 + number % 5)),
        )
        for number in range(1, 30)
    ]
    generation = row(0.0, 1.0, forward=99, forwards=16, rows=5, groups=1, run_s=9.0)
    backward = row(
        0.0, 1.0, scenario="attribution", forward=98, forwards=1, rows=5, groups=1, run_s=9.0
    )

    found = fit_run(run(level([*rows, *rows, generation, backward])))

    assert found.forwards == 29
    assert found.cost.base_s == pytest.approx(0.01)
    assert found.cost.row_s == pytest.approx(1e-4)
    assert found.cost.request_s == pytest.approx(2e-3)
    assert found.error < 1e-6


def test_what_can_not_be_fitted_says_why() -> None:
    with pytest.raises(RunError, match="at least 3"):
        fit_run(BROKEN)
    with pytest.raises(RunError, match="without its requests"):
        fit_run(without_requests(QUICK))
