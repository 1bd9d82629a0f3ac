"""Figures about adapters and memory: 2, 4, 8, 17, 18, 20."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from benchmarks.paper import plots
from benchmarks.paper.study import BASELINES, LOW, MEDIUM, Study
from benchmarks.paper.summary import SLO_S
from benchmarks.paper.tables import Check, Outcome, Row, compare
from benchmarks.simulator.cost_model import LENGTH_FACTOR, MEDIUM_INPUT, PROFILES
from benchmarks.simulator.simulate import simulate
from benchmarks.workload import Workload

IDLE_TTFT_MS = {8: 74, 16: 78, 32: 88, 64: 107, 128: 144}
FAR_APART_S = 100.0


def idle_ttft(study: Study) -> Outcome:
    """One request at a time, each to find its adapter on the host."""
    rows: list[Row] = []
    times: dict[str, list[float]] = {"paper": [float(ms) for ms in IDLE_TTFT_MS.values()], "ours": [], "the adapter's load": []}
    for profile, system in (("a40-llama-7b", "s-lora"), ("a100-tp4-llama-70b", "s-lora")):
        ranks = np.array(list(IDLE_TTFT_MS))
        n = len(ranks)
        tokens = np.full(n, MEDIUM_INPUT), np.full(n, max(2, round(129 * LENGTH_FACTOR)))
        alone = simulate(Workload(np.arange(n) * FAR_APART_S, *tokens, np.arange(n), ranks), PROFILES[profile], system)
        for rank, ttft, wait in zip(ranks.tolist(), alone.ttft.tolist(), alone.adapter_wait.tolist(), strict=True):
            a40 = profile.startswith("a40")
            rows.append(compare(f"TTFT, rank {rank}, {profile}", IDLE_TTFT_MS[rank] if a40 else None, 1e3 * ttft, "ms"))
            paper = {(True, 128): 17.5, (False, 32): 68.0}.get((a40, rank))
            rows.append(compare(f"load's share of it, rank {rank}", paper, 100 * wait / ttft, "%"))
            if a40:
                times["ours"].append(1e3 * ttft)
                times["the adapter's load"].append(1e3 * wait)
    plot, axes = plots.grid(title="Figure 2: idle TTFT by rank, A40")
    plots.bars(axes[0], list(IDLE_TTFT_MS), times, "rank", "TTFT, ms")
    note = (
        f"A request of {MEDIUM_INPUT} prompt tokens alone; no seed matters. The A40's profile was fitted to these five times."
    )
    table = study.table("One request at a time", rows, note, "as the rows say")
    return Outcome("Figure 2: idle TTFT by rank", [table], plot)


def number_of_adapters(study: Study) -> Outcome:
    counts, loads = (1, 50, 500), (LOW, MEDIUM, study.near_knee())
    runs = {
        (name, count, rps): study.case(name, rps, ranks=(32,), num_adapters=count)
        for name in (*BASELINES, "chameleon")
        for count in counts
        for rps in loads
    }
    points = study.measure(runs)
    rows = []
    for name in (*BASELINES, "chameleon"):
        for rps in loads:
            for count, paper in zip(counts[1:], (1.69, 2.60), strict=True):
                change = points[name, count, rps].change(points[name, 1, rps])
                ratio = dataclasses.replace(change, **{k: 1 + v / 100 for k, v in dataclasses.asdict(change).items()})
                claimed = paper if name in BASELINES and rps == MEDIUM else None
                rows.append(compare(f"P99 TTFT, {count} adapters over 1, {name} at {rps:g} RPS", claimed, ratio, "x"))
    plot, axes = plots.grid(3, title="Figure 4: adapters of rank 32", panel=(4.4, 4.0))
    for axis, rps in zip(axes, loads, strict=True):
        series = {name: [points[name, count, rps]["ttft_p99"] for count in counts] for name in (*BASELINES, "chameleon")}
        plots.bars(axis, counts, series, f"adapters, {rps:g} RPS", "P99 TTFT, s")
    note = (
        "In the paper transfers saturate the link; here they do not, as the calibrated loads take a few per cent of its time."
    )
    link = [
        {"system": n, "requests/s": r, "adapters": c, "link busy, %": 100 * points[n, c, r].mean("link_busy")}
        for n, c, r in runs
        if c > 1
    ]
    tables = [
        study.table("P99 TTFT relative to one adapter", rows),
        study.table("Share of time that the link is busy", link, note),
    ]
    return Outcome("Figure 4: number of adapters", tables, plot)


def spikes(study: Study) -> Outcome:
    names = ("s-lora", "chameleon", "chameleon-plus")
    points = study.measure({name: study.case(name, 5.0, shape="spike", spike_share=0.2, timeline=True) for name in names})
    rows = []
    for name, point in points.items():
        rows.append(
            compare(
                f"median free memory, {name}", "plentiful" if name == "s-lora" else None, 100 * point.mean("free_median"), "%"
            )
        )
        rows.append(
            compare(f"least free memory, {name}", "collapses" if name == "s-lora" else None, 100 * point.mean("free_min"), "%")
        )
        rows.append(compare(f"most memory of adapters, {name}", None, 100 * point.mean("adapters_max"), "%"))
        rows.append(compare(f"P99 TTFT, {name}", None, point["ttft_p99"], "s"))
    plot, axes = plots.grid(len(names), title="Figure 8: memory in a load spike", panel=(4.6, 4.0))
    for axis, (name, point) in zip(axes, points.items(), strict=True):
        parts = [[100 * value for value in point.line(line)] for line in ("kv_line", "adapters_line", "free_line")]
        axis.stackplot(point.line("time"), parts, labels=["KV", "adapters", "free"], colors=["#0072B2", "#E69F00", "#DDDDDD"])
        axis.set(xlabel=f"time, s ({name})", ylabel="pool, %", ylim=(0, 100))
        axis.legend(loc="lower left", fontsize=8)
    note = "5 requests a second on average, three times the base rate in the middle fifth. The paper states no numbers here."
    return Outcome("Figure 8: memory in a spike", [study.table("Memory over time", rows, note)], plot)


def _pressure(study: Study) -> dict[str, dict[str, Any]]:
    """Workloads from none to much need of eviction. All 100 adapters fit the idle pool, 500 do not."""
    near = study.near_knee()
    return {
        f"{MEDIUM:g} RPS": {"rps": MEDIUM},
        f"{near:g} RPS": {"rps": near},
        f"{MEDIUM:g} RPS, locality 0.84": {"rps": MEDIUM, "locality": 0.84},
        f"{MEDIUM:g} RPS, 500 adapters": {"rps": MEDIUM, "num_adapters": 500},
        f"{near:g} RPS, 500 adapters": {"rps": near, "num_adapters": 500},
        f"{LOW:g} RPS, 500 uniform adapters": {"rps": LOW, "num_adapters": 500, "adapter_exponent": 0.0},
    }


def policies(study: Study) -> Outcome:
    names = ("chameleon-no-cache", "chameleon-lru", "chameleon-fairshare", "chameleon-gdsf", "chameleon", "chameleon-plus")
    loads = _pressure(study)
    first = next(iter(loads))
    points = study.measure({(n, label): study.case(n, **fields) for label, fields in loads.items() for n in names})
    papers = {("chameleon-lru", first): -18.0, ("chameleon-fairshare", first): -22.0, ("chameleon", first): -26.0}
    rows = []
    for label in loads:
        for name in names[1:]:
            change = points[name, label].change(points["chameleon-no-cache", label])
            rows.append(compare(f"P99 TTFT of {name} against no cache, {label}", papers.get((name, label)), change, "%"))
        change = points["chameleon", label].change(points["chameleon-fairshare", label], "ttft_p99_largest_rank")
        paper = -12.0 if label == first else None
        rows.append(compare(f"P99 TTFT of rank 128, chameleon against fairshare, {label}", paper, change, "%"))
    detail = [
        {"load": label, "system": name, "P99 TTFT, s": point["ttft_p99"], "of rank 128, s": point["ttft_p99_largest_rank"]}
        | {"hits, %": 100 * point.mean("hit_rate"), "loads": point.mean("loads"), "link busy, %": 100 * point.mean("link_busy")}
        for (name, label), point in points.items()
    ]
    plot, axes = plots.grid(1, 2, title="Figure 17: eviction policies", panel=(11.0, 3.6))
    for axis, value, text in zip(axes, ("ttft_p99", "ttft_p99_largest_rank"), ("all requests", "rank 128"), strict=True):
        plots.bars(axis, list(loads), {n: [points[n, k][value] for k in loads] for n in names}, "", f"P99 TTFT, s, {text}")
    order = ("chameleon", "chameleon-fairshare", "chameleon-lru")
    checks = [
        Check(f"P99 TTFT: chameleon <= fairshare <= lru at {k} (s)", [(n, points[n, k].mean("ttft_p99")) for n in order])
        for k in loads
    ]
    note = "The paper's percentages are taken to be against no cache. Where no adapter is ever evicted, all policies are one."
    tables = [study.table("P99 TTFT against no cache", rows, note), study.table("Eviction policies", detail)]
    return Outcome("Figure 17: eviction policies", tables, plot, checks)


def prefetch(study: Study) -> Outcome:
    names, loads = ("chameleon", "chameleon-prefetch"), _pressure(study)
    points = study.measure({(n, label): study.case(n, **fields) for label, fields in loads.items() for n in names})
    changes = {label: points[names[1], label].change(points[names[0], label]) for label in loads}
    rows: list[Row] = []
    for i, (label, change) in enumerate(changes.items()):
        rows.append(compare(f"P99 TTFT with predictive prefetch, {label}", None if i else -8.8, change, "%"))
        rows += [compare(f"hits of {n}, {label}", None, 100 * points[n, label].mean("hit_rate"), "%") for n in names]
    plot, axes = plots.grid(title="Figure 18: predictive prefetch", panel=(9.0, 4.0))
    plots.bars(axes[0], list(loads), {"chameleon-prefetch": list(changes.values())}, "", "change of P99 TTFT, %")
    note = (
        "The paper does not name the load of its 8.8 %; the medium one is assumed. Prefetch helps only adapters that were used "
        "before and evicted since; where none is, it does nothing."
    )
    return Outcome("Figure 18: predictive prefetch", [study.table("Predictive prefetch", rows, note)], plot)


def many_adapters(study: Study) -> Outcome:
    counts, names = (10, 25, 50, 100, 150, 200), ("s-lora", "chameleon", "chameleon-plus")
    ranks, loads = {"uniform ranks": 0.0, "power-law ranks": 1.0}, (study.near_knee(), 9.5)
    runs = {
        (name, kind, rps, count): study.case(name, rps, num_adapters=count, rank_exponent=exponent)
        for name in names
        for kind, exponent in ranks.items()
        for rps in loads
        for count in counts
    }
    points = study.measure(runs)
    papers = {("s-lora", "uniform ranks"): 10.0, ("chameleon", "uniform ranks"): 100.0, ("chameleon", "power-law ranks"): 150.0}
    rows = []
    for rps in reversed(loads):
        for kind in ranks:
            for name in names:
                met = [float(c) for c in counts if points[name, kind, rps, c].mean("ttft_p99") <= SLO_S]
                paper = papers.get((name, kind)) if rps == 9.5 else None
                rows.append(
                    compare(f"most adapters within the target, {name}, {kind}, {rps:g} RPS", paper, max(met, default=0.0))
                )
    detail = [
        {"requests/s": rps, "ranks": kind, "adapters": count} | {n: points[n, kind, rps, count]["ttft_p99"] for n in names}
        for rps in loads
        for kind in ranks
        for count in counts
    ]
    plot, axes = plots.grid(2, 2, title="Figure 20: number of adapters")
    for axis, (rps, kind) in zip(axes, [(rps, kind) for rps in loads for kind in ranks], strict=True):
        lines = {name: [points[name, kind, rps, count].mean("ttft_p99") for count in counts] for name in names}
        plots.curves(axis, counts, lines, f"adapters, {kind}, {rps:g} RPS", "P99 TTFT, s", log=True)
        plots.target(axis)
    tables = [
        study.table("Adapters that a system bears", rows, "0: none of those tried."),
        study.table("P99 TTFT in seconds", detail),
    ]
    return Outcome("Figure 20: number of adapters", tables, plot)
