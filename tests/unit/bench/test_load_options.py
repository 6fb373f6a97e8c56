"""What can't be done as asked is refused in one line, with status 2, before anything is sent."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.load.cli import run_command
from ndif_ops.bench import main

URL = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["load", URL, "--users", "1,0"], "'0' is no whole number above 0"),
        (["load", URL, "--rate", "-3"], "'-3' is no number above 0"),
        (["load", URL, "--rate", "inf"], "'inf' is no number above 0"),
        (["load", URL, "--scenario", "lens"], "no scenario 'lens'"),
        (["load", URL, "--scenario", "patching=0.5"], "make them add up to 1"),
        (["load", URL, "--max-p95", "quick"], "'quick' is no number from 0 on"),
        (["load", URL, "--max-errors", "-1"], "--max-errors"),
        (["load", URL, "--prompt-tokens", "9-3"], "the smaller number comes first"),
        (["load", URL, "--rate", "3", "--users", "1,2"], "give --users N"),
        (["load", URL, "--rate", "3", "--think", "1"], "--think is for users"),
        (["load", URL, "--replay", "a.jsonl", "--rate", "3"], "leave --users and --rate out"),
        (["load", URL, "--record", "a.txt"], "ends with .jsonl or .msgpack"),
        (["load", URL, "--record", "a.jsonl"], "--record is of one load"),
        (["load", URL, "--api-keys", "/no/such/file"], "can't read API keys"),
        (["load", URL, "--users", "1", "--no-plots"], f"can't reach {URL}"),
        (["load", "local:demo"], "give http://HOST:PORT"),
        (["load"], "the following arguments are required: url"),
        (["weigh"], "invalid choice: 'weigh'"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: int | str | None = run_command(arguments)
    except SystemExit as end:  # argparse has ended it
        status = end.code

    shown = capsys.readouterr()
    assert status == 2
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out


def test_a_file_without_keys_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").write_text("\n\n")

    assert run_command(["load", URL, "--api-keys", str(tmp_path / "keys")]) == 2
    assert "put one on each line" in capsys.readouterr().err


def test_where_the_source_is_missing_the_command_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bench.load.cli", None)

    with pytest.raises(SystemExit) as end:
        main()

    assert end.value.code == 2
    assert "pip install -e '.[bench]'" in capsys.readouterr().err
