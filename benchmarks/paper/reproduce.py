"""The paper's evaluation in simulation: for each figure a table of paper, ours and difference, and a plot.

Finished runs are kept under OUT/.cache by their content, so an interrupted reproduction goes on where it ended.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import describe
from benchmarks.paper import cache_figures, extra_figures, hardware_figures, headline, load_figures, scheduler_figures
from benchmarks.paper.runs import Cache, Runner, fingerprint
from benchmarks.paper.study import QUICK, Settings, Study
from benchmarks.paper.tables import Outcome
from benchmarks.workload import Trace

OUT = Path("benchmarks/results/paper")
FIGURES: dict[str, Callable[[Study], Outcome]] = {
    "2": cache_figures.idle_ttft,
    "4": cache_figures.number_of_adapters,
    "8": cache_figures.spikes,
    "11": load_figures.ttft_p99,
    "12": load_figures.tbt,
    "13": load_figures.ttft_p50,
    "14": load_figures.critical_path,
    "15": load_figures.over_time,
    "16": load_figures.queueing,
    "17": cache_figures.policies,
    "18": cache_figures.prefetch,
    "19": scheduler_figures.predictor_accuracy,
    "20": cache_figures.many_adapters,
    "21": scheduler_figures.other_traces,
    "22": scheduler_figures.static_levels,
    "23": hardware_figures.models,
    "24": hardware_figures.memory,
    "25": hardware_figures.tensor_parallel,
    "plus": extra_figures.plus,
    "locality": extra_figures.locality,
    "calibration": extra_figures.calibration,
    "one-pass": extra_figures.one_pass,
}
INTRODUCTION = """# Chameleon's evaluation, simulated

Every number here comes from a simulator: the serving loop that serves, under a virtual clock, on a device that is a cost
model fitted to the paper's A40. Nothing was measured on a GPU. "Difference" is ours minus the paper's, in the row's own unit;
"-": there is no number. PASS and DIFFERS say whether an order that the paper reports is ours too.
"""


def reproduce(names: list[str], settings: Settings, out: Path, workers: int) -> dict[str, Any]:
    """Make the figures, and write results.json, tables.md and the plot after each; files of an earlier call are replaced."""
    out.mkdir(parents=True, exist_ok=True)
    sources, begin = fingerprint(), time.perf_counter()
    result: dict[str, Any] = describe() | {"sources": sources, "settings": _plain(settings), "figures": {}}
    tables = [INTRODUCTION]
    with Runner(Cache(out / ".cache", sources), workers) as runner:
        whole = Study(settings, runner)
        for name in names:
            started, executed = time.perf_counter(), runner.executed
            study = Study(settings, runner)
            outcome = FIGURES[name](study)
            whole.points |= study.points
            image = f"figure-{name.zfill(2)}.png"
            outcome.plot.savefig(out / image, metadata={"Software": None})
            tables.append(outcome.markdown(image))
            result["figures"][name] = _figure(outcome, study)
            result |= {"simulator": whole.speed(), "wall_s": round(time.perf_counter() - begin, 1)}
            result["executed"] = runner.executed  # the others came from the cache
            (out / "results.json").write_text(_dump(result) + "\n")
            (out / "tables.md").write_text("\n".join([*tables, _footer(result)]))
            typer.echo(f"figure {name}: {runner.executed - executed} runs, {time.perf_counter() - started:.0f} s", err=True)
            for check in outcome.checks:
                typer.echo(f"  {check.text()}")
    return result


def _plain(settings: Settings) -> dict[str, Any]:
    return dataclasses.asdict(settings) | {"trace": str(settings.trace) if settings.trace else None}


def _figure(outcome: Outcome, study: Study) -> dict[str, Any]:
    return {
        "title": outcome.title,
        "tables": [table.json() for table in outcome.tables],
        "checks": [{"check": check.text(), "passes": check.passes} for check in outcome.checks],
        "per_seed": study.record(),
    }


def _dump(value: Any, indent: int = 0, width: int = 400) -> str:
    """JSON with short values on one line, so that two reproductions can be compared line by line."""
    text = json.dumps(value)
    if len(text) <= width or not isinstance(value, (dict, list)):
        return text
    if isinstance(value, dict):
        items = [f"{json.dumps(name)}: {_dump(item, indent + 1)}" for name, item in value.items()]
    else:
        items = [_dump(item, indent + 1) for item in value]
    pad = "\n" + " " * (indent + 1)
    return text[0] + pad + f",{pad}".join(items) + pad[:-1] + text[-1]


def _footer(result: dict[str, Any]) -> str:
    speed = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in result["simulator"].items())
    made = f"`{result['command']}`, {result['machine']}, {result['date']}, sources {result['sources']}"
    made += f", in {result['wall_s']:.0f} s, {result['executed']} runs simulated, the others cached"
    return f"---\n\nMade by {made}.\n\nSimulator, in one process: {speed}.\n"


def main(
    figure: Annotated[
        list[str] | None, typer.Option(help=f"Figure to make; repeat for several (default: all): {', '.join(FIGURES)}.")
    ] = None,
    headline_only: Annotated[
        bool, typer.Option("--headline", help="Make the headline on S-LoRA's own loop, in place of the figures.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Take fewer loads and shorter runs, and two seeds where --seeds is not given.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Workloads to simulate for each point (default: 5, with --quick 2).")
    ] = None,
    trace: Trace = None,
    out: Annotated[Path, typer.Option(help="Directory for tables, figures and the JSON file.")] = OUT,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that simulate (default: one for each core).")] = None,
) -> None:
    """Reproduce the figures of the Chameleon paper in simulation.

    Example: python -m benchmarks paper --quick --figure 11
    """
    if headline_only:
        if figure:
            raise typer.BadParameter(f"--figure is {figure[0]!r}; allowed: no figure with --headline")
        extent, knees = (headline.QUICK, headline.QUICK) if quick else (headline.FULL, headline.KNEES)
        if seeds:
            extent, knees = (dataclasses.replace(e, seeds=tuple(range(seeds))) for e in (extent, knees))
        extent, knees = (dataclasses.replace(e, trace=trace) for e in (extent, knees))
        headline.headline(extent, knees, out, workers or os.cpu_count() or 1)
        typer.echo((out / "headline.md").read_text())
        return
    names = list(dict.fromkeys(figure or FIGURES))
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise typer.BadParameter(f"--figure is {unknown[0]!r}; allowed: {', '.join(FIGURES)}")
    settings = QUICK if quick else Settings()
    settings = dataclasses.replace(settings, trace=trace, seeds=tuple(range(seeds)) if seeds else settings.seeds)
    result = reproduce(names, settings, out, workers or os.cpu_count() or 1)
    typer.echo(f"{len(names)} figures in {result['wall_s']:.0f} s: {out}/tables.md, results.json, figure-*.png")
