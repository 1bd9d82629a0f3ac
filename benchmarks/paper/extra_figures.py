"""Figures beyond the paper: our own system beside the paper's, and the effect of locality in adapter use."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.paper import plots
from benchmarks.paper.study import A40, BASELINES, HIGH, LOW, MEDIUM, RELATIVE, Study
from benchmarks.paper.tables import Outcome, Row, compare
from benchmarks.simulator.cost_model import LENGTH_FACTOR
from chameleon_jax.systems import SYSTEMS, System

PLUS = "chameleon-plus"
SMALL_POOL = "a40-llama-7b-small-pool"
PASSES = {"two passes, as the paper's systems": A40, "one pass, as our engine": "a40-llama-7b-one-pass"}
LENGTH_FACTORS = (0.16, LENGTH_FACTOR, 0.21)
FULL_RPS = 12.5
"""Load at which memory is full in the paper."""
WORKLOADS: dict[str, dict[str, Any]] = {
    "calibrated": {},
    "uniform adapters": {"adapter_exponent": 0.0},
    "locality 0.84": {"locality": 0.84},
    "spike": {"shape": "spike", "spike_share": 0.2},
}
MEASURES = {
    "P99 TTFT": ("ttft_p99", 1.0, "s"),
    "P50 TTFT": ("ttft_p50", 1.0, "s"),
    "P99 gap between tokens": ("tbt_p99", 1e3, "ms"),
    "mean wait of the worst rank": ("worst_rank_queue", 1.0, "s"),
    "mean wait of the worst size class": ("worst_size_queue", 1.0, "s"),
}


def plus(study: Study) -> Outcome:
    """Compare at loads that are shares of chameleon's own knee on each workload."""
    names = ("s-lora", "chameleon", PLUS)
    cases = {(name, workload): study.case(name, **fields) for workload, fields in WORKLOADS.items() for name in names}
    knees = study.knees(cases)
    loads = {(w, load): round(RELATIVE[load] * knees["chameleon", w], 3) for w in WORKLOADS for load in ("medium", "high")}
    points = study.measure({(n, w, load): cases[n, w].at(rps=rps) for n in names for (w, load), rps in loads.items()})
    rows: list[Row] = []
    for w in WORKLOADS:
        rows.append({"workload": w, "measure": "knee, RPS"} | {name: knees[name, w] for name in names})
        for load in ("medium", "high"):
            for measure, (key, scale, unit) in MEASURES.items():
                row: Row = {"workload": w, "measure": f"{measure}, {unit}, at {loads[w, load]:.2f} RPS"}
                row |= {name: scale * points[name, w, load].mean(key) for name in names}
                row[f"{PLUS} against chameleon, %"] = points[PLUS, w, load].change(points["chameleon", w, load], key)
                rows.append(row)
    plot, axes = plots.grid(3, title="Ours beside the paper's system", panel=(5.4, 4.0))
    plots.bars(axes[0], list(WORKLOADS), {name: [knees[name, w] for w in WORKLOADS] for name in names}, "", "knee, RPS")
    for axis, load in zip(axes[1:], ("medium", "high"), strict=True):
        series = {name: [points[name, w, load]["ttft_p99"] for w in WORKLOADS] for name in names}
        plots.bars(axis, list(WORKLOADS), series, "", f"P99 TTFT, s, {load} load", log=True)
    note = "Loads are 0.93 and 1.05 of chameleon's own knee on each workload. The paper has none of these figures."
    tables = [
        study.table(f"{PLUS} and chameleon", rows, note),
        _ablation(study, "the calibrated workload", loads["calibrated", "medium"], loads["calibrated", "high"], {}),
        _ablation(study, "400 adapters, all alike", MEDIUM, HIGH, {"num_adapters": 400, "adapter_exponent": 0.0}),
    ]
    return Outcome("Ours: chameleon-plus", tables, plot)


def ablations() -> dict[str, System]:
    """Our system with one choice at a time set back to the paper's."""
    ours, theirs = SYSTEMS[PLUS], SYSTEMS["chameleon"]
    changed = [f.name for f in dataclasses.fields(System) if getattr(ours, f.name) != getattr(theirs, f.name)]
    return {
        f"{name} = {getattr(theirs, name)!r}": dataclasses.replace(ours, **{name: getattr(theirs, name)}) for name in changed
    }


def _ablation(study: Study, workload: str, medium: float, high: float, spec: dict[str, Any]) -> Any:
    variants = {PLUS: SYSTEMS[PLUS], **ablations()}
    for name in ("chameleon", "s-lora"):
        variants |= {f"{name} + bound_stalls": dataclasses.replace(SYSTEMS[name], bound_stalls=True), name: SYSTEMS[name]}
    found = study.knees({label: study.case(system, **spec) for label, system in variants.items()})
    loads = (medium, high)
    points = study.measure({(v, rps): study.case(system, rps, **spec) for v, system in variants.items() for rps in loads})
    rows: list[Row] = []
    for label in variants:
        row: Row = {"system": label if label.split()[0] in SYSTEMS else f"with {label}", "knee, RPS": found[label]}
        row[f"P99 TTFT at {medium:.2f} RPS, s"] = points[label, medium]["ttft_p99"]
        row[f"P99 TTFT at {high:.2f} RPS, s"] = points[label, high]["ttft_p99"]
        row["P99 gap, ms"] = 1e3 * points[label, medium].mean("tbt_p99")
        row["worst rank's mean wait, s"] = points[label, medium].mean("worst_rank_queue")
        row["hits, %"] = 100 * points[label, medium].mean("hit_rate")
        row["loads"] = points[label, medium].mean("loads")
        rows.append(row)
    note = "One choice at a time set back to chameleon's; the last four columns are at the lower load."
    return study.table(f"{PLUS}, effect of each choice: {workload}", rows, note)


def locality(study: Study) -> Outcome:
    names, values = ("s-lora", "chameleon-lru", "chameleon", PLUS), (0.0, 0.84)
    loads: dict[str, dict[str, Any]] = {f"{rps:g} RPS": {"rps": rps} for rps in sorted({LOW, MEDIUM, study.near_knee(), HIGH})}
    loads[f"{MEDIUM:g} RPS, 500 adapters"] = {"rps": MEDIUM, "num_adapters": 500}
    knees = study.knees({(name, value): study.case(name, locality=value) for name in names for value in values})
    points = study.measure(
        {(n, v, load): study.case(n, locality=v, **fields) for load, fields in loads.items() for n in names for v in values}
    )
    rows: list[Row] = []
    for load in loads:
        for name in names:
            row: Row = {"load": load, "system": name}
            for value in values:
                row[f"P99 TTFT, s, locality {value:g}"] = points[name, value, load]["ttft_p99"]
                row[f"hits, %, locality {value:g}"] = 100 * points[name, value, load].mean("hit_rate")
                row[f"loads, locality {value:g}"] = points[name, value, load].mean("loads")
            rows.append(row)
    against = [
        compare(f"P99 TTFT of {name} against s-lora, {load}, locality {value:g}", None, change, "%")
        for value in values
        for load in loads
        for name in names[1:]
        for change in [points[name, value, load].change(points["s-lora", value, load])]
    ]
    tops = [{"system": name} | {f"knee, RPS, locality {value:g}": knees[name, value] for value in values} for name in names]
    plot, axes = plots.grid(1, 2, title="Locality of adapter use", panel=(10.0, 3.6))
    for axis, value in zip(axes, values, strict=True):
        series = {name: [points[name, value, load]["ttft_p99"] for load in loads] for name in names}
        plots.bars(axis, list(loads), series, f"locality {value:g}", "P99 TTFT, s", log=True)
    note = "Locality: probability that a request names a recent one's adapter; a real LoRA trace has 0.84."
    tables = [
        study.table("Both ends of locality", rows, note),
        study.table("Knees", tops),
        study.table("Against s-lora", against),
    ]
    return Outcome("Locality", tables, plot)


def calibration(study: Study) -> Outcome:
    """Show the effect of the A40 profile's two free numbers, lengths and pool, on the paper's figures of its machine."""
    pools = {A40: "all that the device leaves", SMALL_POOL: "2,005 pages"}
    cases: dict[tuple[float, str], dict[str, Any]] = {
        (f, p): {"length_factor": f, "profile": p} for f in LENGTH_FACTORS for p in pools
    }
    knees = study.knees({(n, *key): study.case(n, **fields) for key, fields in cases.items() for n in BASELINES})
    points = study.measure(
        {(rps, *key): study.case("chameleon", rps, **fields) for key, fields in cases.items() for rps in (MEDIUM, FULL_RPS)}
    )
    rows: list[Row] = []
    for factor, profile in cases:
        row: Row = {"lengths x": factor, "pool": pools[profile]}
        row |= {f"knee of {name}, RPS (paper 8.6)": knees[name, factor, profile] for name in BASELINES}
        row["hits at 8 RPS, % (paper about 75)"] = 100 * points[MEDIUM, factor, profile].mean("hit_rate")
        row["median free memory at 12.5 RPS, % (paper about 0)"] = 100 * points[FULL_RPS, factor, profile].mean("free_median")
        rows.append(row)
    plot, axes = plots.grid(1, title="Calibration", panel=(6.0, 4.0))
    series = {f"{n}, {pools[p]}": [knees[n, f, p] for f in LENGTH_FACTORS] for n in BASELINES for p in pools}
    plots.bars(axes[0], [f"{f:g}" for f in LENGTH_FACTORS], series, "lengths x", "knee, RPS")
    note = (
        f"Chosen: lengths x {LENGTH_FACTOR}, the whole pool. No choice has all three; the hit rate is the one that is given up."
    )
    return Outcome("Calibration of the A40", [study.table("Effect of lengths and pool", rows, note)], plot)


def one_pass(study: Study) -> Outcome:
    """Show what systems gain where a step's prompts and decodes are one pass."""
    names = ("s-lora", "chameleon", PLUS)
    cases = {(name, passes): study.case(name, profile=profile) for name in names for passes, profile in PASSES.items()}
    knees = study.knees(cases)
    points = study.measure({(*key, rps): case.at(rps=rps) for key, case in cases.items() for rps in (MEDIUM, HIGH)})
    before, after = PASSES
    rows: list[Row] = []
    for name in names:
        row: Row = {"system": name} | {f"knee, RPS, {passes}": knees[name, passes] for passes in PASSES}
        row["change of the knee, %"] = 100 * (knees[name, after] / knees[name, before] - 1)
        for rps in (MEDIUM, HIGH):
            row[f"P99 TTFT at {rps:g} RPS, change, %"] = points[name, after, rps].change(points[name, before, rps])
        row |= {f"P99 gap at {MEDIUM:g} RPS, ms, {p}": 1e3 * points[name, p, MEDIUM].mean("tbt_p99") for p in PASSES}
        rows.append(row)
    plot, axes = plots.grid(1, title="One pass for prompts and decodes", panel=(6.0, 4.0))
    plots.bars(axes[0], list(names), {p: [knees[name, p] for name in names] for p in PASSES}, "", "knee, RPS")
    note = (
        "One pass reads the weights and pays for launches once, instead of once for prompts and once for decodes. The bound of "
        f"{PLUS} on the time between tokens shrinks with the step that it is taken from."
    )
    return Outcome("One pass", [study.table("Two passes and one", rows, note, ", ".join(PASSES.values()))], plot)
