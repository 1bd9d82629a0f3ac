"""Systems against the same open-loop traffic, on the engine itself: one model in memory, the systems in turn, forth and back.

    python -m benchmarks.serve --system s-lora --system chameleon --rps 1.5 --num-pages 300 --repeats 2 --predict

Requests, adapters and lengths are those of `benchmarks.workload`; pass k draws them with seed + k, the same for every system.
With --predict a cost model is fitted to timed steps of this engine, and `benchmarks.simulate` says what it would have expected.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer

from benchmarks.machine import describe, publish
from benchmarks.serving.calibrate import STEP_TERMS
from benchmarks.serving.comparison import (
    Comparison,
    Settings,
    build_engine,
    compare,
    memory_over_time,
    orders,
    ratios,
    run,
    tables,
)
from benchmarks.serving.engine import ATTENTION, BenchmarkEngine
from benchmarks.workload import ARRIVALS, SHAPES, Workload, WorkloadSpec, generate
from chameleon_jax.systems import get_system

DEFAULT_SYSTEMS = ("s-lora", "chameleon-no-sched", "chameleon")


def main(
    model: Annotated[str, typer.Argument(help="As for LLM; with --load-format dummy also a preset's name.")] = "smollm2-135m",
    system: Annotated[list[str] | None, typer.Option(help="Repeat it; default: " + ", ".join(DEFAULT_SYSTEMS))] = None,
    rps: Annotated[float, typer.Option(help="Mean requests a second.")] = 1.5,
    duration_s: Annotated[float, typer.Option("--duration", help="Seconds in which requests arrive.")] = 60.0,
    repeats: Annotated[int, typer.Option(min=1, help="Passes over the systems.")] = 1,
    seed: int = 0,
    length_factor: Annotated[float, typer.Option(help="Scales Azure's input and output tokens.")] = 0.03,
    max_input: Annotated[int | None, typer.Option(help="Tokens to which inputs are cut.")] = None,
    max_output: Annotated[int | None, typer.Option(help="Tokens to which outputs are cut.")] = None,
    num_adapters: int = 30,
    ranks: Annotated[str, typer.Option(help="Comma-separated; adapters have them in turn.")] = "8,16,32,64,128",
    adapter_exponent: Annotated[float, typer.Option(help="Power law of popularity within a rank.")] = 1.0,
    locality: Annotated[float, typer.Option(help="Probability of repeating a recent adapter.")] = 0.0,
    arrivals: Annotated[str, typer.Option(help=", ".join(ARRIVALS))] = "poisson",
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "flat",
    peak_factor: Annotated[float, typer.Option(help="Highest rate over lowest.")] = 3.0,
    spike_share: Annotated[float, typer.Option(help="Share of time that is busy.")] = 0.1,
    trace: Annotated[Path | None, typer.Option(help="CSV or CSV.gz with Azure's columns.")] = None,
    num_pages: Annotated[int | None, typer.Option(help="Pages of the pool; default: as the engine chooses.")] = None,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 128,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest request, tokens; default: the workload's, rounded up.")
    ] = None,
    load_format: str = "auto",
    dtype: str = "auto",
    lora_host_gib: Annotated[int, typer.Option(help="Host memory for adapters.")] = 4,
    predictor: Annotated[str, typer.Option(help="history, oracle or proxy-ACCURACY.")] = "proxy-0.8",
    ttft_slo: Annotated[float, typer.Option(help="Seconds; throughput counts requests within it.")] = 5.0,
    tbt_slo: Annotated[float, typer.Option(help="Seconds between tokens that systems which bound stalls aim at.")] = 0.3,
    predict: Annotated[bool, typer.Option(help="Calibrate, and simulate the same workloads.")] = False,
    calibration_s: Annotated[float, typer.Option(help="Seconds of traffic a system and pass to calibrate with.")] = 8.0,
    out: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Directory of the picture, named as the JSON file.")] = None,
) -> None:
    """Serve a workload with several systems, measure, and compare."""
    systems = list(dict.fromkeys(system or DEFAULT_SYSTEMS))
    settings = Settings(predictor, length_factor, ttft_slo, tbt_slo, max_num_batched_tokens, max_num_seqs)
    try:
        for name in systems:
            get_system(name)
        spec = WorkloadSpec(
            rps=rps,
            duration_s=duration_s,
            seed=seed,
            length_factor=length_factor,
            max_input=max_input,
            max_output=max_output,
            num_adapters=num_adapters,
            ranks=tuple(int(rank) for rank in ranks.split(",")),
            adapter_exponent=adapter_exponent,
            locality=locality,
            arrivals=arrivals,
            shape=shape,
            peak_factor=peak_factor,
            spike_share=spike_share,
            trace=trace,
        )
        workloads = [generate(dataclasses.replace(spec, seed=seed + i)) for i in range(repeats)]
        others = generate(dataclasses.replace(spec, seed=seed + 1000, duration_s=calibration_s))
        if not all(map(len, [*workloads, others])):
            raise ValueError("a workload has no request; raise --rps, --duration or --calibration-s")
        config = {"num_pages": num_pages, "load_format": load_format, "dtype": dtype, "lora_host_bytes": lora_host_gib << 30}
        if max_model_len is not None:
            config["max_model_len"] = max_model_len
        engine = build_engine(model, [*workloads, others], systems, settings, config)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    if not predict:
        run(engine, others, systems[0], settings)  # the first steps of a process are slow
    comparison = compare(engine, systems, workloads, others if predict else None, settings)
    engine.close()
    report(engine, comparison, workloads, ttft_slo, out, plots)


def report(
    engine: BenchmarkEngine,
    comparison: Comparison,
    workloads: list[Workload],
    ttft_slo: float,
    out: Path | None,
    plots: Path | None,
) -> None:
    """Prints tables, writes the JSON file and the picture."""
    layout = engine.layout
    page_mib = layout.page_bytes(engine.dtype.itemsize) / 2**20
    adapter_pages = sum(layout.place(dict.fromkeys(ATTENTION, rank)).num_pages for rank in workloads[0].ranks.tolist())
    tokens = [np.concatenate([getattr(w, f) for w in workloads]).mean() for f in ("input_tokens", "output_tokens")]
    rows, details = tables(comparison, ttft_slo)
    about: dict[str, Any] = describe(f"python -m benchmarks.serve {shlex.join(sys.argv[1:])}") | {
        "device": jax.devices()[0].device_kind,
        "model": engine.model_name,
        "requests": [len(workload) for workload in workloads],
        "tokens": f"{tokens[0]:.1f} in, {tokens[1]:.1f} out",
        "pool": f"{engine.num_pages} pages of {page_mib:.3g} MiB; all adapters take {adapter_pages}",
    }
    if comparison.calibration is not None:
        terms = dict(zip(STEP_TERMS, comparison.calibration.step, strict=True))
        about["calibration, seconds"] = dataclasses.asdict(comparison.calibration) | {"step": terms}
        about["order by TTFT p99"] = orders(comparison)
    if len(workloads) > 1:
        rows += ratios(details)
    publish(about | {"table": rows}, None)
    if out is not None:
        for name, runs in comparison.measured.items():
            details[name]["memory"] = memory_over_time(runs[0])
        text = json.dumps(about | {"table": rows, "systems": details}, indent=1)
        out.write_text(re.sub(r"\[[\d\s.,-]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text) + "\n")
    if plots is not None:
        from benchmarks.serving.plots import draw  # matplotlib is not needed otherwise

        plots.mkdir(parents=True, exist_ok=True)
        file = plots / f"{out.stem if out is not None else 'serve'}.png"
        draw(comparison.measured, comparison.adjusted, page_mib, engine.model_name, file)


if __name__ == "__main__":
    typer.run(main)
