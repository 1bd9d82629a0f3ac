"""The paper's evaluation again, simulated: for each figure a table of paper, ours and difference, and a plot.

    python -m benchmarks.reproduce_paper --quick

What has run is kept under OUT/.cache by content, so an interrupted reproduction goes on where it ended.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import describe
from benchmarks.paper.figures import FIGURES
from benchmarks.paper.runs import Cache, Runner, fingerprint
from benchmarks.paper.study import QUICK, Settings, Study
from benchmarks.paper.tables import Outcome

OUT = Path("benchmarks/results/paper")
INTRODUCTION = """# Chameleon's evaluation, simulated

Every number here comes from a simulator: the serving loop that serves, under a virtual clock, on a device that is a cost
model fitted to the paper's A40. Nothing was measured on a GPU. "Difference" is ours minus the paper's, in the row's own unit;
"-": there is no number. PASS and DIFFERS say whether an order that the paper reports is ours too.
"""


def reproduce(names: list[str], settings: Settings, out: Path, workers: int, command: str) -> dict[str, Any]:
    """Makes the figures; writes results.json, tables.md and the plot after each. What an earlier call wrote is replaced."""
    out.mkdir(parents=True, exist_ok=True)
    sources, begin = fingerprint(), time.perf_counter()
    result: dict[str, Any] = describe(command) | {"sources": sources, "settings": _plain(settings), "figures": {}}
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
    """JSON with what is short on one line, so that two reproductions can be compared line by line."""
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
    figure: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(FIGURES)}; repeatable. Default: all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two seeds, fewer loads, shorter runs.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds; default: 5, quick 2.")] = None,
    trace: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="CSV of Azure's columns, for lengths.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = OUT,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: all cores.")] = None,
) -> None:
    """Reproduce the paper's figures in simulation.

    Example: python -m benchmarks.reproduce_paper --quick --figure 11
    """
    names = list(dict.fromkeys(figure or FIGURES))
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise typer.BadParameter(f"--figure is {unknown[0]!r}; allowed: {', '.join(FIGURES)}")
    settings = QUICK if quick else Settings()
    settings = dataclasses.replace(settings, trace=trace, seeds=tuple(range(seeds)) if seeds else settings.seeds)
    command = " ".join(["python -m benchmarks.reproduce_paper", *sys.argv[1:]])
    result = reproduce(names, settings, out, workers or os.cpu_count() or 1, command)
    typer.echo(f"{len(names)} figures in {result['wall_s']:.0f} s: {out}/tables.md, results.json, figure-*.png")


if __name__ == "__main__":
    typer.run(main)
