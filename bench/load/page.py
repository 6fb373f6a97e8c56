"""A load test as one HTML page that needs nothing else: figures, plots and facts in one file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape

import msgspec

from bench.load.run import Run
from bench.load.table import (
    PARTS,
    PARTS_CAPTION,
    caption,
    cells,
    headings,
    parts,
    title,
    warnings,
)

_TITLES = {
    "latency": "Latency against the load",
    "cdf": "How many requests were how fast",
    "throughput": "Throughput against the load",
    "occupancy": "Requests that shared a forward, over time",
}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
       color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(32rem, 1fr)); gap: 1rem; }
figure { margin: 0; } img { width: 100%; } figcaption, .note { color: #555; }
.warning { color: #a15c00; } .missed { color: #b00020; font-weight: bold; }
pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; }
"""


def html_page(run: Run, plots: Mapping[str, bytes], missed: Sequence[str] = ()) -> str:
    """Return the page.

    Args:
        run: what it is about.
        plots: PNG images by name, which become part of the page.
        missed: thresholds that were not met, in words.
    """
    lines = [
        "<!doctype html>",
        '<html lang="en"><meta charset="utf-8">',
        f"<title>Load test: {escape(run.server.model)}</title>",
        f"<style>{_STYLE}</style>",
        "<h1>Load test</h1>",
        f"<p>{escape(title(run))}. {escape(run.date)}, {escape(run.server.url)}.</p>",
        *(f'<p class="missed">{escape(each)}</p>' for each in missed),
        _table(headings(run), [cells(level) for level in run.levels]),
        f'<p class="note">{escape(caption(run))}. A figure with ≥ is a lower bound: requests were '
        "given up.</p>",
        *(f'<p class="warning">{escape(each)}</p>' for each in warnings(run)),
        _table(PARTS, [parts(level) for level in run.levels]),
        f'<p class="note">{escape(PARTS_CAPTION)}.</p>',
        '<div class="plots">',
        *(_figure(name, image) for name, image in plots.items()),
        "</div>",
        _scenarios(run),
        "<h2>What it ran on</h2>",
        f"<pre>{escape(_facts(run))}</pre>",
        "</html>",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _figure(name: str, image: bytes) -> str:
    source = f"data:image/png;base64,{b64encode(image).decode()}"
    words = escape(_TITLES.get(name, name))
    return f'<figure><img alt="{words}" src="{source}"><figcaption>{words}</figcaption></figure>'


def _scenarios(run: Run) -> str:
    rows = [
        [level.name, name, str(found.count), *map(found.show, (found.p50, found.p95, found.p99))]
        for level in run.levels
        for name, found in level.summary.by_scenario.items()
    ]
    if not any(len(level.summary.by_scenario) > 1 for level in run.levels):
        return ""
    columns = ["", "scenario", "requests", "p50 s", "p95 s", "p99 s"]
    return "<h2>By scenario</h2>\n" + _table(columns, rows)


def _facts(run: Run) -> str:
    facts = {
        "server": run.server,
        "settings": run.settings,
        "harness": run.machine,
        "versions": run.versions,
        "source": run.source,
    }
    return msgspec.json.format(msgspec.json.encode(facts), indent=2).decode()
