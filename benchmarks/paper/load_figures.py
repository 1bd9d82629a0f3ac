"""Figures over load on the A40: 11 to 16."""

from __future__ import annotations

from benchmarks.paper import plots
from benchmarks.paper.study import BASELINES, HIGH, LOW, MEDIUM, RELATIVE, Point, Study
from benchmarks.paper.summary import SIZE_CLASSES, SLO_S
from benchmarks.paper.tables import Check, Outcome, Row, Table, compare

SYSTEMS = (
    "s-lora-published",
    "s-lora",
    "sjf",
    "fifo",
    "chameleon-no-cache",
    "chameleon-no-sched",
    "chameleon",
    "chameleon-plus",
)
OURS = ("chameleon", "chameleon-plus")
LOADS = (LOW, MEDIUM, HIGH)
RPS, P99 = "requests/s", "P99 TTFT, s"


def _curve(study: Study) -> dict[tuple[str, float], Point]:
    loads = sorted({*study.settings.loads, *LOADS})
    return study.measure({(name, rps): study.case(name, rps) for name in SYSTEMS for rps in loads})


def _lines(
    points: dict[tuple[str, float], Point], value: str, scale: float = 1.0
) -> tuple[list[float], dict[str, list[float]]]:
    loads = sorted({rps for _, rps in points})
    names = list(dict.fromkeys(name for name, _ in points))
    return loads, {name: [scale * points[name, rps].mean(value) for rps in loads] for name in names}


def _curve_table(study: Study, title: str, points: dict[tuple[str, float], Point], value: str, note: str = "") -> Table:
    loads, lines = _lines(points, value)
    return study.table(title, [{RPS: rps} | {name: points[name, rps][value] for name in lines} for rps in loads], note)


def ttft_p99(study: Study) -> Outcome:
    points = _curve(study)
    knees = study.knees({name: study.case(name) for name in SYSTEMS})
    ours = OURS
    near = study.measure(
        {
            (name, base): study.case(name, round(RELATIVE["high"] * knees[base], 3))
            for base in BASELINES
            for name in (base, *ours)
        }
    )
    headline: list[Row] = []
    for base in BASELINES:
        for name in ours:
            claimed = (-14.7, -24.6, -80.7) if name == "chameleon" else (None, None, None)
            for rps, paper in zip(LOADS, claimed, strict=True):
                change = points[name, rps].change(points[base, rps])
                headline.append(compare(f"P99 TTFT of {name} against {base} at {rps:g} RPS", paper, change, "%"))
            change = near[name, base].change(near[base, base])
            rps = RELATIVE["high"] * knees[base]
            headline.append(compare(f"the same 5 % above {base}'s knee, at {rps:.2f} RPS", None, change, "%"))
    paper_knees = {"s-lora": 8.6, "chameleon": 12.9}
    paper_ratios = {"s-lora": 1.0, "chameleon": 1.5, "chameleon-no-sched": 1.2, "chameleon-no-cache": 1.05}
    throughput: list[Row] = [compare(f"knee of {name}", paper_knees.get(name), knee, "RPS") for name, knee in knees.items()]
    for base in BASELINES:
        for name, knee in knees.items():
            if name != base:
                paper = paper_ratios.get(name)
                throughput.append(compare(f"knee of {name} over {base}'s", paper, knee / knees[base], "x"))
    plot, axes = plots.grid(title="Figure 11: P99 TTFT against load")
    plots.curves(axes[0], *_lines(points, "ttft_p99"), RPS, P99, log=True)
    plots.target(axes[0])
    ladder = ("s-lora", "chameleon-no-cache", "chameleon-no-sched", "chameleon")
    return Outcome(
        "Figure 11: P99 TTFT and throughput",
        [
            study.table(
                "Headline: P99 TTFT",
                headline,
                "Changes are geometric means of the ratios over seeds. Past a knee the queue grows for as long as requests "
                "arrive, so the ratios there follow from the length of the run. The paper has one baseline, S-LoRA, and so "
                "one number; it stands beside both of ours. Claims are made against s-lora, the fair one.",
            ),
            study.table(
                "Throughput",
                throughput,
                f"Knee: highest load whose P99 TTFT (mean over seeds) meets {SLO_S:g} s, bracketed to "
                f"{study.settings.tolerance:.1%} and interpolated. Smaller differences say nothing.",
            ),
            _curve_table(study, "P99 TTFT in seconds", points, "ttft_p99"),
            _curve_table(study, "Share of requests within the target", points, "within_slo"),
        ],
        plot,
        [Check("throughput: s-lora <= no-cache <= no-sched <= chameleon (RPS)", [(name, knees[name]) for name in ladder])],
    )


def tbt(study: Study) -> Outcome:
    points = _curve(study)
    ours, rows = ("s-lora", "s-lora-published", *OURS), []
    for rps in LOADS:
        for name in ours:
            paper = "under 150" if name in ("s-lora", "chameleon") else None
            rows.append(
                compare(f"P99 gap between tokens, {name} at {rps:g} RPS", paper, 1e3 * points[name, rps].mean("tbt_p99"), "ms")
            )
            rows.append(compare(f"P99 of a request's mean gap, {name}", None, 1e3 * points[name, rps].mean("tpot_p99"), "ms"))
    plot, axes = plots.grid(2, title="Figure 12: time between tokens")
    for axis, value, label in zip(
        axes, ("tbt_p99", "tpot_p99"), ("P99 gap, ms", "P99 of a request's mean gap, ms"), strict=True
    ):
        plots.curves(axis, *_lines(points, value, 1e3), RPS, label)
        plots.target(axis, 150, "ms")
    note = "The paper does not say whether its TBT is taken over gaps or over requests; 150 ms is its target."
    checks = [
        Check(
            f"P99 gap: chameleon <= s-lora at {rps:g} RPS (ms)",
            [(n, 1e3 * points[n, rps].mean("tbt_p99")) for n in ("chameleon", "s-lora")],
        )
        for rps in LOADS
    ]
    tables = [study.table("Time between tokens", rows, note), _curve_table(study, "P99 gap in seconds", points, "tbt_p99")]
    return Outcome("Figure 12: time between tokens", tables, plot, checks)


def ttft_p50(study: Study) -> Outcome:
    points = _curve(study)
    rows = []
    for base in BASELINES:
        for name in OURS:
            claimed = (-13.9, -20.9, -48.1) if name == "chameleon" else (None, None, None)
            for rps, paper in zip(LOADS, claimed, strict=True):
                change = points[name, rps].change(points[base, rps], "ttft_p50")
                rows.append(compare(f"P50 TTFT of {name} against {base} at {rps:g} RPS", paper, change, "%"))
    plot, axes = plots.grid(title="Figure 13: P50 TTFT against load")
    plots.curves(axes[0], *_lines(points, "ttft_p50"), RPS, "P50 TTFT, s", log=True)
    plots.target(axes[0])
    tables = [study.table("P50 TTFT", rows), _curve_table(study, "P50 TTFT in seconds", points, "ttft_p50")]
    return Outcome("Figure 13: P50 TTFT", tables, plot)


def critical_path(study: Study) -> Outcome:
    points = _curve(study)
    rows = []
    for rps in LOADS:
        for name in ("s-lora", "s-lora-published", "chameleon", "chameleon-plus"):
            point = points[name, rps]
            waits = {"s-lora": "up to 30", "chameleon": "up to 6"}.get(name)
            rows.append(
                compare(f"P99 wait for the adapter, {name} at {rps:g} RPS", waits, 1e3 * point.mean("adapter_wait_p99"), "ms")
            )
            rows.append(compare(f"mean wait for the adapter, {name}", None, 1e3 * point.mean("adapter_wait_mean"), "ms"))
            hits = 75.0 if name == "chameleon" else None
            rows.append(compare(f"adapters there when the turn came, {name}", hits, 100 * point.mean("hit_rate"), "%"))
    plot, axes = plots.grid(3, title="Figure 14: adapter loads on the critical path", panel=(4.6, 4.0))
    plots.curves(axes[0], *_lines(points, "adapter_wait_mean", 1e3), RPS, "mean wait for the adapter, ms")
    plots.curves(axes[1], *_lines(points, "adapter_wait_p99", 1e3), RPS, "P99 wait for the adapter, ms")
    plots.curves(axes[2], *_lines(points, "hit_rate", 100), RPS, "adapter there when the turn came, %")
    note = (
        "A baseline without a cache hits where another running request already uses the adapter, or a prefetch ended in time."
    )
    return Outcome("Figure 14: load on the critical path", [study.table("Adapter loads", rows, note)], plot)


def over_time(study: Study) -> Outcome:
    names = ("s-lora", "sjf", *OURS)
    loads = {"9 RPS (the paper's high load)": HIGH, "8 RPS": MEDIUM}
    points = study.measure({(name, rps): study.case(name, rps, timeline=True) for name in names for rps in loads.values()})
    plot, axes = plots.grid(2, title="Figure 15: P99 TTFT over time")
    rows: list[Row] = []
    for axis, (label, rps) in zip(axes, loads.items(), strict=True):
        lines = {name: points[name, rps].line("ttft_p99_line") for name in names}
        plots.curves(axis, points[names[0], rps].line("time"), lines, f"arrival, s, at {label}", P99, log=True)
        axis.set_ylim(bottom=0.1)  # room for the legend
        plots.target(axis)
        for name in names:
            first, last = (sum(half) / len(half) for half in (lines[name][:15], lines[name][-15:]))
            paper = {"s-lora": "breaks", "sjf": "breaks", "chameleon": "meets"}.get(name) if rps == HIGH else None
            verdict = "breaks" if points[name, rps].mean("ttft_p99") > SLO_S else "meets"
            rows.append({RPS: rps, "system": name, "target, paper": paper, "target, ours": verdict, "difference": None})
            if paper is not None:
                rows[-1]["difference"] = "none" if paper == verdict else "opposite"
            rows[-1] |= {"P99, s": points[name, rps]["ttft_p99"], "P99 line, first quarter, s": first, "last quarter, s": last}
    note = (
        "The line is the P99 of the requests that arrive in a sixtieth of the time, mean over seeds; the target is the run's."
    )
    return Outcome("Figure 15: TTFT over time", [study.table("Time to first token over time", rows, note)], plot)


def queueing(study: Study) -> Outcome:
    names = ("s-lora", "sjf", *OURS)
    points = study.measure({(name, rps): study.case(name, rps) for name in names for rps in LOADS})
    paper = {("s-lora", "small"): 28.6} | {("chameleon", size): "under 8" for size in SIZE_CLASSES}
    rows = [
        compare(
            f"{size} requests, {name} at {rps:g} RPS",
            paper.get((name, size)),
            100 * points[name, rps].mean(f"queue_share_{size}"),
            "%",
        )
        for rps in LOADS
        for name in names
        for size in SIZE_CLASSES
    ]
    plot, axes = plots.grid(3, title="Figure 16: share of a request's time in the queue", panel=(4.4, 4.0))
    for axis, rps in zip(axes, LOADS, strict=True):
        series = {name: [100 * points[name, rps].mean(f"queue_share_{size}") for size in SIZE_CLASSES] for name in names}
        plots.bars(axis, SIZE_CLASSES, series, f"size class, {rps:g} RPS", "time in the queue, %")
        axis.set_ylim(0, 100)
    note = "Classes are terciles of the true weighted size; shares are means over a class's requests. The paper names no load."
    table = study.table("Share of a request's time before its admission", rows, note)
    return Outcome("Figure 16: queueing by size", [table], plot)
