"""Systems against the same open-loop traffic, on the engine itself.

One model stays in memory and the systems take turns, forth and back. Pass k draws its requests with seed + k, the same for
every system. With --predict a cost model is fitted to timed steps of this engine, and the simulator predicts the same runs.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer

from benchmarks import workload
from benchmarks.machine import Out, describe, publish
from benchmarks.serving import comparison
from benchmarks.serving.engine import ATTENTION, BenchmarkEngine
from benchmarks.serving.options import LoraHostGib, MaxNumBatchedTokens, MaxNumSeqs, NumPages, TbtSlo, TtftSlo
from benchmarks.simulator.calibration import STEP_TERMS
from benchmarks.simulator.simulate import Predictor
from chameleon_jax.systems import get_system

DEFAULT_SYSTEMS = ("s-lora", "chameleon-no-sched", "chameleon")


def main(
    model: Annotated[
        str,
        typer.Argument(
            help="Preset, GGUF file, Hugging Face or Orbax directory, or hub id; any preset with --load-format dummy."
        ),
    ] = "smollm2-135m",
    system: Annotated[
        list[str] | None, typer.Option(help=f"System to measure; repeat for several (default: {', '.join(DEFAULT_SYSTEMS)}).")
    ] = None,
    rps: workload.Rps = 1.5,
    duration_s: workload.Duration = 60.0,
    repeats: Annotated[int, typer.Option(min=1, help="Passes over the systems, each with a workload of its own.")] = 1,
    seed: workload.Seed = 0,
    length_factor: workload.LengthFactor = 0.03,
    max_input: workload.MaxInput = None,
    max_output: workload.MaxOutput = None,
    num_adapters: workload.NumAdapters = 30,
    ranks: workload.Ranks = "8,16,32,64,128",
    adapter_exponent: workload.AdapterExponent = 1.0,
    locality: workload.Locality = 0.0,
    arrivals: workload.Arrivals = "poisson",
    shape: workload.Shape = "flat",
    peak_factor: workload.PeakFactor = 3.0,
    spike_share: workload.SpikeShare = 0.1,
    trace: workload.Trace = None,
    num_pages: NumPages = None,
    max_num_seqs: MaxNumSeqs = 8,
    max_num_batched_tokens: MaxNumBatchedTokens = 128,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of the longest request, prompt and output (default: the workload's, rounded up).")
    ] = None,
    load_format: Annotated[str, typer.Option(help="auto reads the checkpoint; dummy draws random weights.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Type of weights and pool: auto, float32 or bfloat16.")] = "auto",
    lora_host_gib: LoraHostGib = 4,
    predictor: Predictor = "proxy-0.8",
    ttft_slo: TtftSlo = 5.0,
    tbt_slo: TbtSlo = 0.3,
    predict: Annotated[bool, typer.Option(help="Calibrate the simulator, and simulate the same workloads too.")] = False,
    calibration_s: Annotated[
        float,
        typer.Option(help="Traffic to warm up and calibrate with, seconds; calibration serves it for each system and pass."),
    ] = 8.0,
    out: Out = None,
    plots: Annotated[
        Path | None, typer.Option(help="Directory for the picture, which is named as the JSON file (default: no picture).")
    ] = None,
) -> None:
    """Serve a workload on the engine with several systems, and compare them.

    Example: python -m benchmarks serve --system s-lora --system chameleon --rps 1.5 --num-pages 300 --repeats 2 --predict
    """
    options: dict[str, Any] = dict(locals())
    drawn = {field.name: options[field.name] for field in dataclasses.fields(workload.WorkloadSpec) if field.name in options}
    systems = list(dict.fromkeys(system or DEFAULT_SYSTEMS))
    settings = comparison.Settings(predictor, length_factor, ttft_slo, tbt_slo, max_num_batched_tokens, max_num_seqs)
    try:
        for name in systems:
            get_system(name)
        spec = workload.WorkloadSpec(**drawn | {"ranks": workload.rank_list(ranks)})
        workloads = [workload.generate(dataclasses.replace(spec, seed=seed + i)) for i in range(repeats)]
        others = workload.generate(dataclasses.replace(spec, seed=seed + 1000, duration_s=calibration_s))
        if not all(map(len, [*workloads, others])):
            raise ValueError("a workload has no request; raise --rps, --duration or --calibration-s")
        config = {"num_pages": num_pages, "load_format": load_format, "dtype": dtype, "lora_host_bytes": lora_host_gib << 30}
        if max_model_len is not None:
            config["max_model_len"] = max_model_len
        engine = comparison.build_engine(model, [*workloads, others], systems, settings, config)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    if not predict:
        comparison.run(engine, others, systems[0], settings)  # the first steps of a process are slow
    compared = comparison.compare(engine, systems, workloads, others if predict else None, settings)
    engine.close()
    report(engine, compared, workloads, ttft_slo, out, plots)


def report(
    engine: BenchmarkEngine,
    compared: comparison.Comparison,
    workloads: list[workload.Workload],
    ttft_slo: float,
    out: Path | None,
    plots: Path | None,
) -> None:
    """Print tables, and write the JSON file and the picture."""
    layout = engine.layout
    page_mib = layout.page_bytes(engine.dtype.itemsize) / 2**20
    adapter_pages = sum(layout.place(dict.fromkeys(ATTENTION, rank)).num_pages for rank in workloads[0].ranks.tolist())
    tokens = [np.concatenate([getattr(w, f) for w in workloads]).mean() for f in ("input_tokens", "output_tokens")]
    rows, details = comparison.tables(compared, ttft_slo)
    about: dict[str, Any] = describe() | {
        "device": jax.devices()[0].device_kind,
        "model": engine.model_name,
        "requests": [len(w) for w in workloads],
        "tokens": f"{tokens[0]:.1f} in, {tokens[1]:.1f} out",
        "pool": f"{engine.num_pages} pages of {page_mib:.3g} MiB; all adapters take {adapter_pages}",
    }
    if compared.calibration is not None:
        terms = dict(zip(STEP_TERMS, compared.calibration.step, strict=True))
        about["calibration, seconds"] = dataclasses.asdict(compared.calibration) | {"step": terms}
        about["order by TTFT p99"] = comparison.orders(compared)
    if len(workloads) > 1:
        rows += comparison.ratios(details)
    publish(about | {"table": rows}, None)
    if out is not None:
        for name, runs in compared.measured.items():
            details[name]["memory"] = comparison.memory_over_time(runs[0])
        text = json.dumps(about | {"table": rows, "systems": details}, indent=1)
        out.write_text(re.sub(r"\[[\d\s.,-]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text) + "\n")
    if plots is not None:
        from benchmarks.serving.plots import draw  # matplotlib is not needed otherwise

        plots.mkdir(parents=True, exist_ok=True)
        file = plots / f"{out.stem if out is not None else 'serve'}.png"
        draw(compared.measured, compared.adjusted, page_mib, engine.model_name, file)
