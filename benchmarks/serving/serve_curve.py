"""Time to first token against load, measured on the engine.

The defaults are the paper's setting on a GPU: Llama-7B with random weights, 200 adapters of ranks 8 to 128 on q k v o, and
Azure's conversation lengths cut to fit 2048 tokens. There is one engine. At each load, the lowest first, all systems get the
same requests.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import jax
import typer

from benchmarks.machine import Out, describe, publish, save
from benchmarks.serving.comparison import Settings, build_engine, run
from benchmarks.serving.measure import summarise
from benchmarks.serving.options import LoraHostGib, MaxNumBatchedTokens, MaxNumSeqs, NumPages, TbtSlo, TtftSlo
from benchmarks.simulator.simulate import SYSTEMS, Predictor
from benchmarks.workload import (
    Duration,
    LengthFactor,
    MaxInput,
    MaxOutput,
    NumAdapters,
    Ranks,
    Seed,
    WorkloadSpec,
    generate,
    rank_list,
)

WARM_UP_SECONDS = 5.0
"""Seconds of the lowest load that are served before anything is measured."""
LOADS = (5.0, 10.0, 15.0, 20.0)
COLUMNS = ("ttft_p50_ms", "ttft_p99_ms", "tbt_p99_ms", "tokens_per_s", "met_per_s", "hit_rate", "loaded_mib", "preemptions")


def main(
    model: Annotated[
        str, typer.Argument(help="Name of a preset, or a directory with a config.json; weights are random.")
    ] = "llama-7b",
    system: Annotated[
        list[str] | None, typer.Option(help=f"System to measure; repeat for several (default: {', '.join(SYSTEMS)}).")
    ] = None,
    rps: Annotated[
        list[float] | None,
        typer.Option(help=f"Load, mean requests a second; repeat for several (default: {', '.join(map(str, LOADS))})."),
    ] = None,
    duration_s: Duration = 30.0,
    seed: Seed = 0,
    num_adapters: NumAdapters = 200,
    ranks: Ranks = "8,16,32,64,128",
    length_factor: LengthFactor = 1.0,
    max_input: MaxInput = 1536,
    max_output: MaxOutput = 512,
    max_num_seqs: MaxNumSeqs = 128,
    max_num_batched_tokens: MaxNumBatchedTokens = 2048,
    num_pages: NumPages = None,
    lora_host_gib: LoraHostGib = 48,
    predictor: Predictor = "proxy-0.8",
    ttft_slo: TtftSlo = 5.0,
    tbt_slo: TbtSlo = 0.15,
    compile_programs: Annotated[
        str, typer.Option(help="ahead compiles all programs before the first load; lazy those that a step needs, in it.")
    ] = "ahead",
    out: Out = None,
) -> None:
    """Measure time to first token against load on the engine.

    The JSON file is rewritten after every run.
    """
    options: dict[str, Any] = dict(locals())
    drawn = {field.name: options[field.name] for field in dataclasses.fields(WorkloadSpec) if field.name in options}
    systems, loads = system or list(SYSTEMS), sorted(rps or LOADS)
    settings = Settings(predictor, length_factor, ttft_slo, tbt_slo, max_num_batched_tokens, max_num_seqs)
    try:
        specs = [WorkloadSpec(**drawn | {"ranks": rank_list(ranks), "rps": load}) for load in loads]
        workloads = [generate(spec) for spec in specs]
        config: dict[str, Any] = {"num_pages": num_pages, "load_format": "dummy", "lora_host_bytes": lora_host_gib << 30}
        config["compile_programs"] = compile_programs
        engine = build_engine(model, workloads, systems, settings, config)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    first = generate(dataclasses.replace(specs[0], duration_s=min(duration_s, WARM_UP_SECONDS)))
    if len(first):
        run(engine, first, systems[0], settings)  # the first steps of a process are slow
    about: dict[str, Any] = describe() | {
        "device": jax.devices()[0].device_kind,
        "model": model,
        "pool": f"{engine.num_pages} pages of {engine.layout.page_bytes(engine.dtype.itemsize) / 2**20:.3g} MiB",
        "table": [],
    }
    for load, workload in zip(loads, workloads):
        for name in systems:
            summary = summarise(run(engine, workload, name, settings)[0], ttft_slo)
            row = {"requests a second": load, "system": name, "requests": len(workload)}
            about["table"].append(row | {column: float(f"{summary[column]:.4g}") for column in COLUMNS})
            print(json.dumps(about["table"][-1]), flush=True)
            save(about, out)
    engine.close()
    publish(about, out)
