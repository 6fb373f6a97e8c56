"""`ndif-actor-bench load` drives a real server over HTTP and tells what it saw."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.load.cli import run_command
from bench.load.recording import read_recording
from bench.load.run import Run, read_run
from bench.load.scenarios import MIXTURE, SCENARIOS
from tests.conftest import MakeModel
from tests.integration.server.harness import Server, running

_KEYS = ("first-key", "second-key")

_SHORT = ("--duration", "2", "--warmup", "0.3", "--prompt-tokens", "4-8", "--new-tokens", "3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("load")


@pytest.fixture(scope="module")
def server(model_folder: MakeModel, folder: Path) -> Iterator[Server]:
    """A server that wants an API key."""
    lines = (f"user{i} {hashlib.sha256(key.encode()).hexdigest()}" for i, key in enumerate(_KEYS))
    (folder / "hashes").write_text("\n".join(lines))
    (folder / "keys").write_text("\n".join(_KEYS))
    options = ("--api-key-file", str(folder / "hashes"))
    with running(model_folder("llama", torch.float32), folder / "server.log", *options) as server:
        yield server


@pytest.fixture(scope="module")
def closed(server: Server, folder: Path) -> tuple[Path, str]:
    """The record of two numbers of users, and what was printed; made by the command itself."""
    out = folder / "closed.json"
    arguments = ["load", server.url, "--users", "1,4", *_SHORT, "--out", str(out)]
    arguments += ["--api-keys", str(folder / "keys"), "--scenario", "mixture", "--max-errors", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.load.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def opened(server: Server, folder: Path) -> Path:
    """The record of Poisson arrivals, which were recorded as well."""
    out, record = folder / "open.json", folder / "sent.jsonl"
    arguments = ["load", server.url, "--rate", "20", "--users", "3", *_SHORT, "--out", str(out)]
    arguments += ["--record", str(record), "--api-keys", str(folder / "keys"), "--no-plots"]
    assert run_command(arguments) == 0
    return out


def check_rows(run: Run) -> None:
    for level in run.levels:
        assert level.requests is not None
        assert len(level.requests) >= level.summary.sent > 3
        for row in level.requests:
            assert row.status == "ok", row.error
            assert row.intended_s <= row.sent_s <= row.done_s
            assert row.queue_s is not None and row.run_s is not None and row.transfer_s is not None
            assert row.queue_s + row.run_s < row.done_s - row.sent_s
            assert row.bytes > 0 or row.scenario == "steering"
            assert row.tokens > 0 and row.forward > 0 and row.groups > 0 and row.rows > 0


def test_users_who_wait_for_answers_are_measured_request_by_request(
    closed: tuple[Path, str],
) -> None:
    run = read_run(closed[0])

    check_rows(run)
    assert [level.users for level in run.levels] == [1, 4]
    assert {row.user for row in run.levels[1].requests or []} == {0, 1, 2, 3}
    assert run.levels[0].summary.groups == 1
    assert run.levels[0].busy_before is not None  # on Linux
    assert run.server.layers == 3 and run.settings.keys == 2
    assert run.settings.weights == MIXTURE
    seen = {row.scenario for level in run.levels for row in level.requests or []}
    assert seen == set(SCENARIOS)
    for key in _KEYS:
        assert key not in closed[0].read_text()


def test_the_command_prints_a_table_and_writes_plots_and_a_page(closed: tuple[Path, str]) -> None:
    out, printed = closed

    for word in ("p50", "p90", "p95", "p99", "req/s", "good/s", "errors", "forwards", "groups"):
        assert word in printed
    for name in ("latency", "cdf", "throughput", "occupancy"):
        image = out.with_name(f"closed-{name}.png").read_bytes()
        assert image.startswith(b"\x89PNG")
    page = out.with_suffix(".html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 4
    assert page.count("http://") == 2  # the server's own address, twice; nothing is fetched


def test_arrivals_are_sent_at_their_times_and_can_be_sent_again(
    server: Server, folder: Path, opened: Path
) -> None:
    first = read_run(opened)
    check_rows(first)
    assert first.levels[0].rate == 20
    sent = read_recording(folder / "sent.jsonl")
    assert len(sent) == len(first.levels[0].requests or [])

    again = ["load", server.url, "--replay", str(folder / "sent.jsonl"), "--speed", "2"]
    again += ["--api-keys", str(folder / "keys"), "--out", str(folder / "again.json"), "--no-plots"]
    assert run_command(again) == 0

    second = read_run(folder / "again.json")
    check_rows(second)
    both = zip(first.levels[0].requests or [], second.levels[0].requests or [], strict=True)
    for old, new in both:
        assert (old.user, old.tokens, old.bytes) == (new.user, new.tokens, new.bytes)
        assert new.intended_s == pytest.approx(old.intended_s / 2, abs=1e-5)


def test_a_missed_threshold_is_told_by_the_status(
    server: Server, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["load", server.url, "--users", "2", "--duration", "0.3", "--warmup", "0"]
    arguments += ["--api-keys", str(folder / "keys"), "--out", str(folder / "missed.json")]
    arguments += ["--no-plots", "--no-requests", "--prompt-tokens", "4"]

    assert run_command([*arguments, "--max-p95", "0.000001"]) == 1
    assert "at most 1e-06 s wanted" in capsys.readouterr().err
    assert run_command([*arguments, "--max-p95", "60", "--min-throughput", "0.1"]) == 0
    assert read_run(folder / "missed.json").levels[0].requests is None


def test_records_are_compared_and_fitted(
    closed: tuple[Path, str], opened: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = str(closed[0])

    assert run_command(["compare", record, record, "--max-slowdown", "1"]) == 0
    assert "4 users" in capsys.readouterr().out
    assert run_command(["compare", record, str(opened)]) == 2
    assert run_command(["fit", str(opened)]) == 0
    assert '"row_s"' in capsys.readouterr().out


def test_what_the_server_refuses_is_told_in_a_line_before_the_test(
    server: Server, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["load", server.url, "--users", "1", "--no-plots"]

    assert run_command(arguments) == 2
    assert "--api-keys FILE" in capsys.readouterr().err
    arguments += ["--api-keys", str(folder / "keys")]
    assert run_command([*arguments, "--prompt-tokens", "300"]) == 2
    assert "the server refuses hidden-states: " in capsys.readouterr().err
    assert run_command([*arguments, "--model", "other"]) == 2
    assert "other" in capsys.readouterr().err
