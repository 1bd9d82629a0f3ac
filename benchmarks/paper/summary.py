"""Scalars that are kept of a simulation, so that thousands of simulations fit a cache and a parent process."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.simulator.simulate import Result

Summary = dict[str, Any]
SLO_S = 5.0
"""The paper's target for the 99th percentile of the time to first token."""
SIZE_CLASSES = ("small", "medium", "large")
BINS = 60
"""Bins of a timeline, over the time in which requests arrive."""


def summarize(result: Result, timeline: bool = False) -> Summary:
    """Summarise a simulation in seconds and shares, by name.

    `tpot` is a request's mean gap between tokens; `queue_share` is the time to admission over the time to the last token. A
    size class is a tercile of the true weighted size. `worst_*` is the largest mean time to admission among the classes.
    With `timeline` there are also lists of BINS elements, None for an empty bin.
    """
    ttft, queue, output = result.ttft, result.queue, result.output
    several = output > 1
    tpot = (result.e2e - ttft)[several] / (output[several] - 1)
    share = queue / result.e2e
    classes, ranks = size_classes(result), np.unique(result.rank)
    by_rank = {int(rank): result.rank == rank for rank in ranks}
    summary: Summary = {
        "ttft_mean": ttft.mean(),
        "ttft_p50": _percentile(ttft, 50),
        "ttft_p99": _percentile(ttft, 99),
        "ttft_p99_largest_rank": _percentile(ttft[result.rank == ranks[-1]], 99),
        "within_slo": (ttft <= SLO_S).mean(),
        "tbt_p50": _percentile(result.tbt, 50),
        "tbt_p99": _percentile(result.tbt, 99),
        "tpot_p99": _percentile(tpot, 99),
        "queue_mean": queue.mean(),
        "worst_rank_queue": max(queue[mask].mean() for mask in by_rank.values()),
        "worst_size_queue": max(queue[classes == i].mean() for i in range(len(SIZE_CLASSES)) if (classes == i).any()),
        "adapter_wait_mean": result.adapter_wait.mean(),
        "adapter_wait_p99": _percentile(result.adapter_wait, 99),
        "hit_rate": result.hit_rate,
        "loads": result.loads,
        "preemption_share": result.preemptions / len(ttft),
        "device_busy": result.device_busy / result.finished_s,
        "link_busy": result.link_busy / result.finished_s,
        "requests": len(ttft),
        "tokens": (result.input + output).sum(),
        "steps": result.steps,
        "simulated_s": result.finished_s,
        "wall_s": result.wall_s,
    }
    for i, name in enumerate(SIZE_CLASSES):
        summary[f"queue_share_{name}"] = share[classes == i].mean() if (classes == i).any() else 0.0
    pool = result.memory[:, 1:].sum(axis=1)
    free = result.memory[:, 3] / pool
    summary |= {"free_median": np.median(free), "free_min": free.min(), "adapters_max": (result.memory[:, 2] / pool).max()}
    summary = {name: float(value) for name, value in summary.items()}
    return summary | (_timeline(result) if timeline else {})


def size_classes(result: Result) -> np.ndarray:
    """Tercile of each request's weighted size, `[n]`, as the paper defines it but with the true output."""
    size = (0.4 * result.input / result.input.max() + 0.6 * result.output / result.output.max()) * result.rank
    return np.searchsorted(np.percentile(size, [100 / 3, 200 / 3]), size)


def _percentile(values: np.ndarray, q: float) -> float:
    return float(np.percentile(values, q)) if len(values) else 0.0


def _timeline(result: Result) -> Summary:
    edges = np.linspace(0, result.arrival[-1] * (1 + 1e-9), BINS + 1)
    arrived, sampled = np.digitize(result.arrival, edges) - 1, np.digitize(result.memory[:, 0], edges) - 1
    share = result.memory[:, 1:] / result.memory[:, 1:].sum(axis=1, keepdims=True)
    lines: dict[str, list[float | None]] = {"time": [float(t) for t in (edges[:-1] + edges[1:]) / 2]}
    lines["ttft_p99_line"] = [_percentile(result.ttft[arrived == i], 99) if (arrived == i).any() else None for i in range(BINS)]
    for column, name in enumerate(("kv_line", "adapters_line", "free_line")):
        lines[name] = [float(share[sampled == i, column].mean()) if (sampled == i).any() else None for i in range(BINS)]
    return dict(lines)
