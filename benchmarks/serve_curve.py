"""Time to first token against load, measured on the engine: `python -m benchmarks.serve_curve`.

Without arguments what the paper serves, on a GPU: Llama-7B of random weights, 200 adapters of ranks 8 to 128 on q k v o, and
Azure's conversation lengths cut to fit 2048 tokens. One engine; at each load, the lowest first, all systems get the same
requests.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from benchmarks.machine import describe, publish
from benchmarks.serving.comparison import Settings, build_engine, run
from benchmarks.serving.measure import summarise
from benchmarks.workload import WorkloadSpec, generate

WARM_UP_SECONDS = 5.0
"""Seconds of the lowest load that are served before anything is measured."""
COLUMNS = ("ttft_p50_ms", "ttft_p99_ms", "tbt_p99_ms", "tokens_per_s", "met_per_s", "hit_rate", "loaded_mib", "squashes")


def main(
    model: Annotated[str, typer.Argument(help="A preset's name, or a directory with a config.json.")] = "llama-7b",
    system: Annotated[list[str] | None, typer.Option(help="Repeat it; default: s-lora, chameleon, chameleon-plus")] = None,
    rps: Annotated[list[float] | None, typer.Option(help="Requests a second; repeat it; default: 5, 10, 15, 20")] = None,
    duration_s: Annotated[float, typer.Option("--duration", help="Seconds in which requests arrive.")] = 30.0,
    seed: int = 0,
    num_adapters: int = 200,
    ranks: Annotated[str, typer.Option(help="Comma-separated; adapters have them in turn.")] = "8,16,32,64,128",
    length_factor: Annotated[float, typer.Option(help="Scales Azure's input and output tokens.")] = 1.0,
    max_input: Annotated[int, typer.Option(help="Tokens to which inputs are cut.")] = 1536,
    max_output: Annotated[int, typer.Option(help="Tokens to which outputs are cut.")] = 512,
    max_num_seqs: int = 128,
    max_num_batched_tokens: int = 2048,
    num_pages: Annotated[int | None, typer.Option(help="Pages of the pool; default: as the engine chooses.")] = None,
    lora_host_gib: Annotated[int, typer.Option(help="Host memory for adapters.")] = 48,
    predictor: Annotated[str, typer.Option(help="history, oracle or proxy-ACCURACY.")] = "proxy-0.8",
    ttft_slo: Annotated[float, typer.Option(help="Seconds; throughput counts requests within it.")] = 5.0,
    tbt_slo: Annotated[float, typer.Option(help="Seconds between tokens that systems which bound stalls aim at.")] = 0.15,
    out: Annotated[Path | None, typer.Option(help="JSON file, rewritten after every run.")] = None,
) -> None:
    """Serve rising loads with several systems."""
    systems, loads = system or ["s-lora", "chameleon", "chameleon-plus"], sorted(rps or [5.0, 10.0, 15.0, 20.0])
    settings = Settings(predictor, length_factor, ttft_slo, tbt_slo, max_num_batched_tokens, max_num_seqs)
    try:
        specs = [
            WorkloadSpec(
                rps=load,
                duration_s=duration_s,
                seed=seed,
                length_factor=length_factor,
                max_input=max_input,
                max_output=max_output,
                num_adapters=num_adapters,
                ranks=tuple(int(rank) for rank in ranks.split(",")),
            )
            for load in loads
        ]
        workloads = [generate(spec) for spec in specs]
        config = {"num_pages": num_pages, "load_format": "dummy", "lora_host_bytes": lora_host_gib << 30}
        engine = build_engine(model, workloads, systems, settings, config)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    first = generate(dataclasses.replace(specs[0], duration_s=min(duration_s, WARM_UP_SECONDS)))
    if len(first):
        run(engine, first, systems[0], settings)  # the first steps of a process are slow
    about: dict[str, Any] = describe(f"python -m benchmarks.serve_curve {shlex.join(sys.argv[1:])}".strip()) | {
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
            print(about["table"][-1], flush=True)
            if out is not None:
                publish(about, out, quiet=True)
    engine.close()
    publish(about, out)


if __name__ == "__main__":
    typer.run(main)
