"""A load test as pictures: latency and throughput against the load, and how forwards filled up."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

from bench.load.run import Level, Run

_INSTALL = (
    "plots need matplotlib: pip install 'ndif-actor[bench]', or leave them out with --no-plots"
)

_SIZE, _DPI = (7.0, 4.0), 110


class PlotError(RuntimeError):
    """Plots can't be made here; the message says what to install."""


def check() -> None:
    """Check that plots can be made.

    Raises:
        PlotError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise PlotError(_INSTALL) from None


def draw_plots(run: Run) -> dict[str, bytes]:
    """Return the plots of a run as PNG images, by name.

    Raises:
        PlotError: matplotlib is missing.
    """
    check()
    drawing: dict[str, Callable[[Any, Run], None]] = {
        "latency": _latency,
        "cdf": _cdf,
        "throughput": _throughput,
        "occupancy": _occupancy,
    }
    return {name: _png(run, draw) for name, draw in drawing.items()}


def _png(run: Run, draw: Callable[[Any, Run], None]) -> bytes:
    from matplotlib.figure import Figure

    # Without pyplot: no window system is asked for, and nothing is kept.
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    draw(axes, run)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    out = BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _latency(axes: Any, run: Run) -> None:
    for name in ("p99", "p95", "p90", "p50"):
        points = [
            (_load(level), getattr(level.summary.latency, name))
            for level in run.levels
            if level.summary.latency is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(run.settings.slo_s, color="grey", linestyle="--", label="SLO")
    _load_axis(axes, run)
    axes.set_ylabel("latency, s")
    axes.set_ylim(bottom=0)


def _cdf(axes: Any, run: Run) -> None:
    for level, colour in zip(run.levels, _colours(run), strict=True):
        if level.summary.curve:
            axes.plot(level.summary.curve, range(101), color=colour, label=level.name)
    axes.axvline(run.settings.slo_s, color="grey", linestyle="--", label="SLO")
    axes.set_xscale("log")
    axes.set_xlabel("latency, s")
    axes.set_ylabel("% of requests within it")


def _throughput(axes: Any, run: Run) -> None:
    loads = [_load(level) for level in run.levels]
    for name, style in (("throughput", "-"), ("goodput", "--")):
        values = [getattr(level.summary, name) for level in run.levels]
        axes.plot(loads, values, style, marker="o", label=name)
    if run.settings.loop != "closed":
        axes.plot(loads, loads, ":", color="grey", label="arrivals")
    _load_axis(axes, run)
    axes.set_ylabel("requests a second")
    axes.set_ylim(bottom=0)


def _occupancy(axes: Any, run: Run) -> None:
    for level, colour in zip(run.levels, _colours(run), strict=True):
        moments = level.summary.occupancy
        times = [moment.at_s for moment in moments]
        groups = [moment.groups for moment in moments]
        axes.plot(times, groups, marker=".", color=colour, label=level.name)
    if run.levels and run.levels[0].window.warmup_s:
        axes.axvline(run.levels[0].window.warmup_s, color="grey", linestyle=":", label="warm-up")
    axes.set_xlabel("seconds since the load began")
    axes.set_ylabel("requests in a forward")
    axes.set_ylim(bottom=0)


def _load(level: Level) -> float:
    return float(level.users) if level.rate is None else level.rate


def _load_axis(axes: Any, run: Run) -> None:
    loads = sorted({_load(level) for level in run.levels})
    if loads[-1] > 8 * loads[0] > 0:
        axes.set_xscale("log", base=2)
    axes.set_xticks(loads, [f"{load:.3g}" for load in loads], minor=False)
    axes.set_xlabel("users" if run.settings.loop == "closed" else "arrivals a second")


def _colours(run: Run) -> list[Any]:
    from matplotlib import colormaps

    scale = colormaps["viridis"]
    return [scale(0.9 * number / max(1, len(run.levels) - 1)) for number in range(len(run.levels))]
