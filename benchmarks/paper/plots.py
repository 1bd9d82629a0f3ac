"""Plots of the figures; every system has one colour everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure as Plot
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.paper.statistics import Estimate
from benchmarks.paper.summary import SLO_S

COLORS = {
    "s-lora": "#D55E00",
    "s-lora-published": "#8C3B00",
    "sjf": "#E69F00",
    "fifo": "#999999",
    "chameleon-no-cache": "#56B4E9",
    "chameleon-no-sched": "#0072B2",
    "chameleon": "#009E73",
    "chameleon-plus": "#CC79A7",
    "chameleon-lru": "#F0E442",
    "chameleon-fairshare": "#0072B2",
    "chameleon-gdsf": "#000000",
    "chameleon-prefetch": "#CC79A7",
    "static": "#E69F00",
}
MARKERS = "osv^D<>Pdh"


def grid(columns: int = 1, rows: int = 1, title: str = "", panel: tuple[float, float] = (5.6, 4.0)) -> tuple[Plot, list[Any]]:
    """Make a plot and its axes, row by row, with a title that says it is simulated."""
    plot = Plot(figsize=(panel[0] * columns, panel[1] * rows + 0.3), dpi=110, layout="constrained")
    plot.suptitle(f"{title} (simulated)", fontsize=11)
    axes = plot.subplots(rows, columns, squeeze=False)
    return plot, list(axes.flat)


def curves(
    axis: Any, x: Sequence[float], lines: Mapping[str, Sequence[Estimate | float]], xlabel: str, ylabel: str, log: bool = False
) -> None:
    """Draw one line a name, in the colour of the system with which the name starts."""
    for i, (name, values) in enumerate(lines.items()):
        y = [value.value if isinstance(value, Estimate) else value for value in values]
        marker = MARKERS[i % len(MARKERS)] if len(y) < 30 else ""
        axis.plot(x, y, label=name, marker=marker, markersize=4, linewidth=1.5, color=_color(name, i))
    if log:
        log_scale(axis)
    _label(axis, xlabel, ylabel)


def bars(
    axis: Any,
    groups: Sequence[Any],
    series: Mapping[str, Sequence[Estimate | float]],
    xlabel: str,
    ylabel: str,
    log: bool = False,
) -> None:
    """Draw a group of bars for each element of `groups`, with one bar a name.

    Whiskers are 95 % intervals. They are drawn if all are shorter than the tallest bar, which is rare with two seeds.
    """
    width = 0.8 / len(series)
    cells = [value for line in series.values() for value in line]
    values = [v.value if isinstance(v, Estimate) else v for v in cells]
    heights = [abs(value) for value in values if math.isfinite(value) and value] or [1.0]
    whiskers = all(v.high - v.low < max(heights) and not (log and v.low <= 0) for v in cells if isinstance(v, Estimate))
    for i, (name, line) in enumerate(series.items()):
        x = [k - 0.4 + width * (i + 0.5) for k in range(len(groups))]
        y = [v.value if isinstance(v, Estimate) else v for v in line]
        axis.bar(x, [v if math.isfinite(v) else 0 for v in y], width * 0.92, label=name, color=_color(name, i))
        for position, value in zip(x, line, strict=True):
            if whiskers and isinstance(value, Estimate):
                axis.plot([position, position], [value.low, value.high], color="black", linewidth=1)
    if log:
        log_scale(axis)
        axis.set_ylim(min(heights) / 2, max(heights) * 2)
    else:
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_ylim(top=max([1.3 * value for value in values if math.isfinite(value) and value > 0], default=None))
    axis.set_xticks(range(len(groups)), [str(group) for group in groups])
    if max(len(str(group)) for group in groups) * len(groups) > 60:
        axis.tick_params(axis="x", rotation=20)
    _label(axis, xlabel, ylabel)


def ratios(axis: Any, groups: Sequence[str], series: Mapping[str, Sequence[float]], ylabel: str) -> None:
    """Markers around 1 on a logarithmic axis: past a knee a ratio of ten would hide all others."""
    for i, (name, line) in enumerate(series.items()):
        x = [k + 0.1 * (i - (len(series) - 1) / 2) for k in range(len(groups))]
        axis.plot(x, line, label=name, marker=MARKERS[i % len(MARKERS)], linestyle="none", color=_color(name, i))
    log_scale(axis)
    axis.set_xticks(range(len(groups)), groups)
    axis.set_xlim(-0.5, len(groups) - 0.5)
    axis.axhline(1, color="black", linewidth=0.8)
    _label(axis, "", ylabel)


def log_scale(axis: Any) -> None:
    """Scale the axis logarithmically, with 1, 2 and 5 of each decade in plain figures."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def target(axis: Any, value: float = SLO_S, unit: str = "s") -> None:
    axis.axhline(value, color="black", linestyle="--", linewidth=1, label=f"target, {value:g} {unit}")
    axis.legend(fontsize=8, framealpha=0.7)


def _color(name: str, index: int) -> Any:
    return COLORS.get(name.split(",")[0], f"C{index}")


def _label(axis: Any, xlabel: str, ylabel: str) -> None:
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(fontsize=8, framealpha=0.7)
