"""The paper's headline on S-LoRA's own loop, a ladder from there to our whole system, and the settings that decide both.

Systems called published run on S-LoRA's loop with S-LoRA's kernels, held to measurements of its authors (`simulator/s_lora.py`)
and to the paper's figure 2. Ours run on the same device with constants that are predicted from an H200's.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, markdown
from benchmarks.paper.runs import Cache, Run, Runner, fingerprint
from benchmarks.paper.statistics import Estimate
from benchmarks.paper.study import Point, Settings, Study
from benchmarks.simulator.cost_model import S_LORA_BATCH_TOKENS, S_LORA_LENGTH_FACTOR, S_LORA_LENGTH_FACTORS
from chameleon_jax.systems import SYSTEMS, System, get_system

S_LORA, ONE_PASS, OUR_ADAPTERS, OURS = "a40-s-lora", "a40-s-lora-one-pass", "a40-s-lora-our-adapters", "a40-ours"
PUBLISHED, FAIR = "s-lora-published", "s-lora"
LOADS = (0.7, 0.93, 1.045)
"""Loads as shares of a baseline's knee: the paper's 6, 8 and 9 requests a second are so of 8.6."""
BATCH_TOKENS = (S_LORA_BATCH_TOKENS, 4096, 8416)
"""Limits of a batch's prompts; S-LoRA's code takes the last for the modelled pool, and the paper reports none."""
FULL = Settings(seeds=tuple(range(10)), duration_s=1800.0)
QUICK = Settings(seeds=(0, 1), duration_s=300.0)
KNEES = Settings(seeds=(0, 1), duration_s=600.0)

Setup = tuple[str | System, str]
"""A system and the profile that it runs on."""
SETUPS: dict[str, Setup] = {
    PUBLISHED: (PUBLISHED, S_LORA),
    "chameleon-published": ("chameleon-published", S_LORA),
    FAIR: (FAIR, OURS),
    "chameleon": ("chameleon", OURS),
    "chameleon-plus": ("chameleon-plus", OURS),
}
"""Systems of the headline."""
_PLUS = SYSTEMS["chameleon-plus"]
_CHAMELEON = SYSTEMS["chameleon"]
LADDER: dict[str, Setup] = {
    "S-LoRA as published": (PUBLISHED, S_LORA),
    "+ the cache": (dataclasses.replace(SYSTEMS[PUBLISHED], eviction="chameleon", keep_idle=True), S_LORA),
    "+ Algorithm 1: Chameleon as published": ("chameleon-published", S_LORA),
    "+ our loop": (_CHAMELEON, S_LORA),
    "+ prompts and decodes in one pass": (_CHAMELEON, ONE_PASS),
    "+ our kernels for adapters": (_CHAMELEON, OUR_ADAPTERS),
    "+ our other kernels and launches": (_CHAMELEON, OURS),
    "+ chameleon-plus's order, and loads that overlap": (
        dataclasses.replace(_CHAMELEON, order="boost", overlap_loads=True),
        OURS,
    ),
    "+ its eviction": (dataclasses.replace(_PLUS, bound_stalls=False), OURS),
    "+ steps bounded by time: chameleon-plus": (_PLUS, OURS),
}
"""Rungs from S-LoRA as it was published to our default, each with all before it."""


def headline(settings: Settings, knees: Settings, out: Path, workers: int) -> dict[str, Any]:
    """Simulate everything, and write headline.json and headline.md into `out`.

    Args:
        settings: Extent of the runs at a load.
        knees: Extent of the runs that search for a knee.
        out: Folder.
        workers: Processes that simulate.
    """
    out.mkdir(parents=True, exist_ok=True)
    sources = fingerprint()
    with Runner(Cache(out / ".cache", sources), workers) as runner:
        study, search = Study(settings, runner), Study(knees, runner)
        runs = {name: _run(study, setup) for name, setup in SETUPS.items()}
        found = search.knees({name: _run(search, setup) for name, setup in (SETUPS | LADDER).items()})
        systems = {name: {"profile": SETUPS[name][1], "knee_rps": round(found[name], 3)} for name in SETUPS}
        ours = {name: run for name, run in runs.items() if run.profile == OURS}
        against = {base: _against(study, those, base, found) for base, those in ((PUBLISHED, runs), (FAIR, ours))}
        result = describe() | {
            "kind": "simulated",
            "sources": sources,
            "duration_s": settings.duration_s,
            "seeds": list(settings.seeds),
            "knees_from": {"duration_s": knees.duration_s, "seeds": list(knees.seeds)},
            "length_factor": S_LORA_LENGTH_FACTOR,
            "batch_max_tokens": S_LORA_BATCH_TOKENS,
            "systems": systems,
            "against": against,
            "ladder": _ladder(study, found),
            "sweeps": _sweeps(Study(dataclasses.replace(QUICK, trace=settings.trace), runner)),
        }
    (out / "headline.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "headline.md").write_text(text(result))
    return result


def _run(study: Study, setup: Setup, length_factor: float = S_LORA_LENGTH_FACTOR, batch: int = S_LORA_BATCH_TOKENS) -> Run:
    system, profile = setup
    batch_tokens = batch if get_system(system).cycles else None
    return study.case(system, profile=profile, length_factor=length_factor, batch_tokens=batch_tokens)


def _against(study: Study, runs: Mapping[str, Run], base: str, knees: Mapping[str, float]) -> dict[str, Any]:
    """Compare systems with one of them at shares of its knee; changes as fractions, times in seconds."""
    rows: dict[str, Any] = {}
    for share in LOADS:
        rps = round(share * knees[base], 3)
        points = study.measure({name: run.at(rps=rps) for name, run in runs.items()})
        for name, point in points.items():
            rows.setdefault(name, {"knee_ratio": round(knees[name] / knees[base], 3), "loads": []})
            rows[name]["loads"].append({"at": share, "rps": rps} | _figures(point, points[base]))
    for row in rows.values():  # the headline's load, past the baseline's knee
        row |= {name: row["loads"][-1][name] for name in ("at", "p99_change", "p50_change", "p99_interval")}
    return rows


def _figures(point: Point, base: Point) -> dict[str, Any]:
    p99, p50 = point.change(base), point.change(base, "ttft_p50")
    return {
        "p99_change": round(p99.value / 100, 4),
        "p99_interval": _interval(p99),
        "p50_change": round(p50.value / 100, 4),
        "p50_interval": _interval(p50),
        "p99_s": round(point.mean("ttft_p99"), 3),
        "p50_s": round(point.mean("ttft_p50"), 3),
        "mean_gap_p99_s": round(point.mean("tpot_p99"), 4),
        "worst_rank_wait_s": round(point.mean("worst_rank_queue"), 3),
        "load_wait_p99_s": round(point.mean("adapter_wait_p99"), 4),
        "hit_rate": round(point.mean("hit_rate"), 3),
    }


def _interval(percent: Estimate) -> list[float] | None:
    """Return the bounds as fractions; None for a single seed."""
    return None if math.isnan(percent.low) else [round(percent.low / 100, 4), round(percent.high / 100, 4)]


def _ladder(study: Study, knees: Mapping[str, float]) -> list[dict[str, Any]]:
    """Measure each rung at the headline's load of S-LoRA as published."""
    rps = round(LOADS[-1] * knees[PUBLISHED], 3)
    points = study.measure({name: _run(study, setup).at(rps=rps) for name, setup in LADDER.items()})
    base = points[next(iter(LADDER))]
    return [
        {"rung": name, "profile": LADDER[name][1], "rps": rps, "knee_rps": round(knees[name], 3)} | _figures(point, base)
        for name, point in points.items()
    ]


def _sweeps(search: Study) -> list[dict[str, Any]]:
    """Search the knees of both published systems over the limit of a batch's prompts and over the length factor."""
    settings = [(S_LORA_LENGTH_FACTOR, batch) for batch in BATCH_TOKENS]
    settings += [(factor, S_LORA_BATCH_TOKENS) for factor in S_LORA_LENGTH_FACTORS if factor != S_LORA_LENGTH_FACTOR]
    names = (PUBLISHED, "chameleon-published", "chameleon-published-no-sched")
    runs: dict[tuple[float, int, str], Run] = {}
    for factor, batch in settings:
        profile = S_LORA if factor == S_LORA_LENGTH_FACTOR else f"{S_LORA}-{factor:g}"
        runs |= {(factor, batch, name): _run(search, (name, profile), factor, batch) for name in names}
    found = search.knees(runs)
    return [
        {"length_factor": factor, "batch_max_tokens": batch} | {name: round(found[factor, batch, name], 3) for name in names}
        for factor, batch in settings
    ]


def text(result: Mapping[str, Any]) -> str:
    """Write the result as Markdown."""
    lines = ["# The headline, simulated", ""]
    knees = result["knees_from"]
    lines += [
        f"Arrivals for {result['duration_s']:g} s, {len(result['seeds'])} seeds; knees are of {knees['duration_s']:g} s and "
        f"{len(knees['seeds'])} seeds, those of the last table of {QUICK.duration_s:g} s and {len(QUICK.seeds)}. Lengths x "
        f"{result['length_factor']}, batches of {result['batch_max_tokens']} prompt tokens on S-LoRA's loop. Systems on "
        "`a40-ours` have constants predicted from an H200's. In brackets: 95 % intervals over seeds.",
    ]
    for base, rows in result["against"].items():
        table = []
        for name, row in rows.items():
            for load in row["loads"]:
                table.append(
                    {
                        "system": name,
                        "profile": result["systems"][name]["profile"],
                        "load / knee": load["at"],
                        "requests/s": load["rps"],
                        "P99 TTFT": _percent(load["p99_change"], load["p99_interval"]),
                        "P50 TTFT": _percent(load["p50_change"], load["p50_interval"]),
                        "P99 s": load["p99_s"],
                        "P50 s": load["p50_s"],
                        "mean gap P99 ms": round(1e3 * load["mean_gap_p99_s"]),
                        "worst rank waits s": load["worst_rank_wait_s"],
                        "knee": result["systems"][name]["knee_rps"],
                        "ratio": row["knee_ratio"],
                    }
                )
        lines += ["", f"## Against {base}", "", *markdown(table)]
    rungs = [
        {
            "rung": row["rung"],
            "profile": row["profile"],
            "P99 TTFT": _percent(row["p99_change"], row["p99_interval"]),
            "P50 TTFT": _percent(row["p50_change"], row["p50_interval"]),
            "mean gap P99 ms": round(1e3 * row["mean_gap_p99_s"]),
            "knee": row["knee_rps"],
        }
        for row in result["ladder"]
    ]
    rps = result["ladder"][0]["rps"]
    lines += ["", f"## The ladder, at {rps} requests a second", "", *markdown(rungs)]
    lines += ["", "## Knees by S-LoRA's limit of a batch and by the length factor", "", *markdown(result["sweeps"])]
    return "\n".join(lines) + f"\n\nMade by `{result['command']}`, {result['machine']}, {result['date']}.\n"


def _percent(value: float, interval: list[float] | None) -> str:
    return f"{value:+.1%}" + (f" [{interval[0]:+.1%}, {interval[1]:+.1%}]" if interval else "")
