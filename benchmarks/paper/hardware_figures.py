"""Figures on other models, memories and device counts: 23, 24, 25. Loads are shares of the baseline's knee on each profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from benchmarks.paper import plots
from benchmarks.paper.study import BASELINES, RELATIVE, Point, Study
from benchmarks.paper.tables import Outcome, Row, Table, compare

NOTE = (
    "Loads are 0.7, 0.93 and 1.05 of the knee that the baseline has on the same profile, as the paper's absolute loads do not "
    "transfer. The A100 profiles are not calibrated; the target stays 5 s."
)
MAX_INPUT = 1024
"""Prompt tokens where the model leaves a pool too small for the longest prompts, one in a thousand."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Column of a figure, with the paper's change of P99 TTFT at high load (percent), and its throughput over the baseline."""

    label: str
    profile: str
    num_adapters: int = 100
    paper_change: float | None = None
    paper_throughput: float | None = None
    start: float = 18.0
    max_input: int | None = None


MODELS = (
    Machine("7B, 500 adapters", "a100-80gb", 500, -60.0, 1.86),
    Machine("13B, 100 adapters", "a100-llama-13b", 100, -61.3, 1.41, 11.0),
    Machine("30B, 10 adapters", "a100-llama-30b", 10, -59.3, 1.67, 3.0, MAX_INPUT),
)
MEMORIES = (
    Machine("24 GB", "a100-24gb", paper_throughput=1.4, start=12.0),
    Machine("48 GB", "a100-48gb", paper_throughput=1.6),
    Machine("80 GB", "a100-80gb", paper_throughput=1.9),
)
DEVICES = (
    Machine("TP1", "a100-tp1"),
    Machine("TP2", "a100-tp2", start=27.0),
    Machine("TP4", "a100-tp4", paper_change=-95.8, start=40.0),
)


def models(study: Study) -> Outcome:
    note = f"{NOTE} Prompts of the 30B model are cut at {MAX_INPUT} tokens."
    return _figure(study, "Figure 23: models", MODELS, note)


def memory(study: Study) -> Outcome:
    return _figure(study, "Figure 24: device memory", MEMORIES, NOTE)


def tensor_parallel(study: Study) -> Outcome:
    return _figure(study, "Figure 25: tensor parallelism", DEVICES, f"{NOTE} In the paper the gain widens with the devices.")


def _figure(study: Study, title: str, machines: Sequence[Machine], note: str) -> Outcome:
    ours = ("chameleon", "chameleon-plus")
    knees: dict[tuple[str, Machine], float] = {}
    for m in machines:
        runs = {
            n: study.case(n, profile=m.profile, num_adapters=m.num_adapters, max_input=m.max_input) for n in (*BASELINES, *ours)
        }
        knees |= {(name, m): knee for name, knee in study.knees(runs, m.start).items()}
    points: dict[tuple[str, str, str, Machine], Point] = study.measure(
        {
            (name, base, load, m): study.case(
                name, round(share * knees[base, m], 3), profile=m.profile, num_adapters=m.num_adapters, max_input=m.max_input
            )
            for m in machines
            for base in BASELINES
            for load, share in RELATIVE.items()
            for name in (base, *ours)
        }
    )
    rows: list[Row] = []
    series: dict[str, list[float]] = {}
    for m in machines:
        for base in BASELINES:
            for name in ours:
                paper = name == "chameleon"
                for load in RELATIVE:
                    change = points[name, base, load, m].change(points[base, base, load, m])
                    claimed = m.paper_change if paper and load == "high" else None
                    rows.append(compare(f"{m.label}: P99 TTFT of {name} against {base}, {load} load", claimed, change, "%"))
                ratio = knees[name, m] / knees[base, m]
                rows.append(
                    compare(f"{m.label}: knee of {name} over {base}'s", m.paper_throughput if paper else None, ratio, "x")
                )
                series.setdefault(f"{name}, over {base}", []).append(ratio)
    labels = [m.label for m in machines]
    profiles = ", ".join(m.profile for m in machines)
    plot, axes = plots.grid(2, title=title, panel=(6.0, 4.2))
    plots.bars(axes[0], labels, {name: [knees[name, m] for m in machines] for name in (*BASELINES, *ours)}, "", "knee, RPS")
    lines = {
        f"{name}, {load} load": [points[name, "s-lora", load, m].change(points["s-lora", "s-lora", load, m]) for m in machines]
        for name in ours
        for load in RELATIVE
    }
    _changes(axes[1], labels, lines)
    tables = [
        study.table("Against the baselines", rows, note, profiles),
        _knees(study, machines, knees, points, profiles),
    ]
    return Outcome(title, tables, plot)


def _changes(axis: object, labels: Sequence[str], lines: Mapping[str, Sequence]) -> None:
    """Ratios on a logarithmic axis: past a knee a change of +1000 % would hide all others."""
    ratios = {name: [1 + change.value / 100 for change in changes] for name, changes in lines.items()}
    plots.ratios(axis, labels, ratios, "P99 TTFT over s-lora's")


def _knees(
    study: Study,
    machines: Sequence[Machine],
    knees: Mapping[tuple[str, Machine], float],
    points: Mapping[tuple[str, str, str, Machine], Point],
    profiles: str,
) -> Table:
    rows: list[Row] = []
    for m in machines:
        for name in dict.fromkeys(name for name, machine in knees if machine == m):
            row: Row = {"machine": m.label, "system": name, "knee, RPS": knees[name, m]}
            for load in RELATIVE:
                point = points.get((name, "s-lora", load, m))
                row[f"P99 TTFT at {load} load of s-lora, s"] = point and point["ttft_p99"]
            point = points.get((name, "s-lora", "medium", m))
            rows.append(row | {"hits at medium, %": point and 100 * point.mean("hit_rate")})
    return study.table("Knees and times to first token", rows, profile=profiles)
