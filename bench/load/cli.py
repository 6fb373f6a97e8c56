"""The `ndif-actor-bench` command: load tests of a running server, and what their records tell.

    ndif-actor-bench load http://HOST:8000 --users 1,4,16,64 --scenario hidden-states
    ndif-actor-bench load http://HOST:8000 --rate 5,10,20 --scenario mixture --max-p95 2
    ndif-actor-bench compare before.json after.json

Exit status: 0, 1 if a threshold was missed, 2 if it can't be done as asked.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console

from bench.load import plots
from bench.load.compare import print_comparison, slowdown
from bench.load.drive import LoadError, Outcome, drive
from bench.load.fitting import fit_run
from bench.load.live import Display
from bench.load.options import USAGE, add_load_options, job, parser_class, thresholds
from bench.load.page import html_page
from bench.load.recording import RecordingError, write_recording
from bench.load.run import Run, RunError, read_run, without_requests, write_run
from bench.load.table import print_run
from bench.machine import describe_machine, describe_source, versions

_MISSED, _INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its status."""
    sys.exit(run_command(arguments))


def run_command(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        status: int = given.command(given)
    except (LoadError, RecordingError, RunError, plots.PlotError) as error:
        status = _complain(error)
    except OSError as error:
        status = _complain(f"{error.filename or 'a file'}: {error.strerror or error}")
    return status


def _parser() -> argparse.ArgumentParser:
    lines = (__doc__ or "").splitlines()
    parser = parser_class()(
        prog="ndif-actor-bench",
        description=lines[0].partition("command: ")[2],
        epilog=lines[-1],
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    load = commands.add_parser("load", help="put load on a running server and measure")
    add_load_options(load)
    load.set_defaults(command=_load)
    compare = commands.add_parser("compare", help="two records side by side")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument(
        "--max-slowdown",
        type=float,
        help="exit with 1 if p95 at any load has grown by more than this factor",
    )
    compare.set_defaults(command=_compare)
    report = commands.add_parser("report", help="print a record again, and make its page")
    report.add_argument("run", type=Path)
    report.add_argument("--html", type=Path, help="write the page here")
    report.set_defaults(command=_report)
    fit = commands.add_parser("fit", help="the cost of a forward, for bench.simulate, as JSON")
    fit.add_argument("run", type=Path)
    fit.set_defaults(command=_fit)
    return parser


# ---------------------------------------------------------------- load


def _load(given: argparse.Namespace) -> int:
    wanted, bounds = job(given), thresholds(given)
    if not given.no_plots:
        plots.check()
    began = datetime.now(UTC)
    machine, source = describe_machine(), describe_source()
    outcome, interrupted = Outcome(), False
    try:
        with Display(Console(stderr=True)) as display:
            asyncio.run(drive(wanted, outcome, display))
    except KeyboardInterrupt:
        interrupted = True
    if outcome.server is None or not outcome.levels:
        return _complain("interrupted before a load was finished", _INTERRUPTED)
    run = Run(
        date=began.isoformat(timespec="seconds"),
        settings=wanted.settings,
        server=outcome.server,
        machine=machine,
        versions=versions(),
        source=source,
        levels=outcome.levels,
    )
    missed = bounds.missed(run.levels)
    out = given.out or Path(f"load-{began:%Y%m%d-%H%M%S}.json")
    written = _write(out, run, missed, given)
    if given.record is not None:
        write_recording(given.record, outcome.sent, run.server.model)
        written.append(given.record)
    # After that: whoever reads this may have gone (`| head`), and a run is not soon done again.
    console = Console()
    print_run(console, run)
    console.print(f"written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    for line in missed:
        print(f"ndif-actor-bench: {line}", file=sys.stderr)
    if interrupted:
        return _complain("interrupted; the loads that were finished are written", _INTERRUPTED)
    if dead := [level.name for level in run.levels if not level.summary.ok]:
        return _complain(f"no request had a result with {', '.join(dead)}", _MISSED)
    return _MISSED if missed else 0


def _write(out: Path, run: Run, missed: Sequence[str], given: argparse.Namespace) -> list[Path]:
    """Write the record, the plots and the page; return what was written."""
    write_run(out, without_requests(run) if given.no_requests else run)
    written = [out]
    if given.no_plots:
        return written
    images = plots.draw_plots(run)
    for name, image in images.items():
        written.append(out.with_name(f"{out.stem}-{name}.png"))
        written[-1].write_bytes(image)
    written.append(out.with_suffix(".html"))
    written[-1].write_text(html_page(run, images, missed), encoding="utf-8")
    return written


# ---------------------------------------------------------------- records


def _compare(given: argparse.Namespace) -> int:
    before, after = read_run(given.before), read_run(given.after)
    print_comparison(Console(), before, after)
    if given.max_slowdown is None:
        return 0
    ratio = slowdown(before, after)
    if ratio <= given.max_slowdown:
        return 0
    return _complain(f"p95 is {ratio:.2f} x, at most {given.max_slowdown:g} x wanted", _MISSED)


def _report(given: argparse.Namespace) -> int:
    run = read_run(given.run)
    if given.html is not None:
        page = html_page(run, plots.draw_plots(run))
        given.html.write_text(page, encoding="utf-8")
    print_run(Console(), run)
    return 0


def _fit(given: argparse.Namespace) -> int:
    found = msgspec.json.encode(fit_run(read_run(given.run)))
    print(msgspec.json.format(found, indent=1).decode())
    return 0


def _complain(message: object, status: int = USAGE) -> int:
    print(f"ndif-actor-bench: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
