"""Picture of a comparison: times to first token, and memory over time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.outcome import Outcome


def draw(
    measured: dict[str, list[Outcome]], predicted: dict[str, list[Outcome]], mib_per_page: float, title: str, file: Path
) -> None:
    """Draw the TTFT's distribution by system over all runs, and the memory of each system's first run."""
    systems = list(measured)
    rows = 1 + len(systems)
    figure = Figure(figsize=(9, 3.4 + 1.7 * len(systems)), layout="tight")
    axes = figure.subplots(rows, 1, height_ratios=[2] + [1] * len(systems))
    top = axes[0]
    for i, name in enumerate(systems):
        for runs, style in ((measured[name], "-"), (predicted.get(name, []), ":")):
            if runs:
                ttft = np.sort(np.concatenate([run.ttft for run in runs]))
                label = name if style == "-" else f"{name}, predicted at its speed"
                top.plot(ttft, np.arange(1, len(ttft) + 1) / len(ttft), style, color=f"C{i}", label=label)
    top.set(xscale="log", xlabel="time to first token, s", ylabel="share of requests", ylim=(0, 1), title=title)
    top.grid(alpha=0.3)
    top.legend(fontsize=7)
    end = max(measured[name][0].finished_s for name in systems)
    for axis, name in zip(axes[1:], systems):
        seconds, kv, adapters, free = measured[name][0].memory.T
        areas = (kv * mib_per_page, adapters * mib_per_page, free * mib_per_page)
        axis.stackplot(seconds, *areas, labels=("KV", "adapters", "free"), colors=("C3", "C0", "0.9"))
        axis.set(xlim=(0, end), ylabel=f"{name}\nMiB")
        axis.margins(y=0)
    axes[1].legend(fontsize=7, loc="upper right")
    axes[-1].set_xlabel("seconds")
    figure.savefig(file, dpi=110)
