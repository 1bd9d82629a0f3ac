"""Time to first token against load, measured on the engine: `python -m benchmarks.serve_curve`.

Without arguments what the paper serves, on a GPU: Llama-7B of random weights, 200 adapters of ranks 8 to 128 on q k v o, and
Azure's conversation lengths cut to fit 2048 tokens. One engine; at each load, the lowest first, all systems get the same
requests.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks.machine import describe, publish
from benchmarks.serving.comparison import Settings, build_engine, run
from benchmarks.serving.measure import summarise
from benchmarks.workload import WorkloadSpec, generate

WARM_UP_SECONDS = 5.0
"""Seconds of the lowest load that are served before anything is measured."""
COLUMNS = ("ttft_p50_ms", "ttft_p99_ms", "tbt_p99_ms", "tokens_per_s", "met_per_s", "hit_rate", "loaded_mib", "squashes")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve_curve", description="Serve rising loads with several systems."
    )
    add = parser.add_argument
    add("model", nargs="?", default="llama-7b", help="a preset's name, or a directory with a config.json")
    add("--system", action="append", help="repeat it; default: s-lora, chameleon, chameleon-plus")
    add("--rps", type=float, action="append", help="requests a second; repeat it; default: 5, 10, 15, 20")
    add("--duration", type=float, default=30.0, help="seconds in which requests arrive")
    add("--seed", type=int, default=0)
    add("--num-adapters", type=int, default=200)
    add("--ranks", default="8,16,32,64,128", help="comma-separated; adapters have them in turn")
    add("--length-factor", type=float, default=1.0, help="scales Azure's input and output tokens")
    add("--max-input", type=int, default=1536, help="tokens to which inputs are cut")
    add("--max-output", type=int, default=512, help="tokens to which outputs are cut")
    add("--max-num-seqs", type=int, default=128)
    add("--max-num-batched-tokens", type=int, default=2048)
    add("--num-pages", type=int, help="pages of the pool; default: as the engine chooses")
    add("--lora-host-gib", type=int, default=48, help="host memory for adapters")
    add("--predictor", default="proxy-0.8", help="history, oracle or proxy-ACCURACY")
    add("--ttft-slo", type=float, default=5.0, help="seconds; throughput counts requests within it")
    add("--tbt-slo", type=float, default=0.15, help="seconds between tokens that systems which bound stalls aim at")
    add("--out", type=Path, help="JSON file, rewritten after every run")
    return parser


def main() -> None:
    """Serve rising loads with several systems."""
    args = (parser := arguments()).parse_args()
    systems, loads = args.system or ["s-lora", "chameleon", "chameleon-plus"], sorted(args.rps or [5.0, 10.0, 15.0, 20.0])
    settings = Settings(
        args.predictor, args.length_factor, args.ttft_slo, args.tbt_slo, args.max_num_batched_tokens, args.max_num_seqs
    )
    try:
        specs = [
            WorkloadSpec(
                rps=load,
                duration_s=args.duration,
                seed=args.seed,
                length_factor=args.length_factor,
                max_input=args.max_input,
                max_output=args.max_output,
                num_adapters=args.num_adapters,
                ranks=tuple(int(rank) for rank in args.ranks.split(",")),
            )
            for load in loads
        ]
        workloads = [generate(spec) for spec in specs]
        config = {"num_pages": args.num_pages, "load_format": "dummy", "lora_host_bytes": args.lora_host_gib << 30}
        engine = build_engine(args.model, workloads, systems, settings, config)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    first = generate(dataclasses.replace(specs[0], duration_s=min(args.duration, WARM_UP_SECONDS)))
    if len(first):
        run(engine, first, systems[0], settings)  # the first steps of a process are slow
    about: dict[str, Any] = describe(f"python -m benchmarks.serve_curve {shlex.join(sys.argv[1:])}".strip()) | {
        "device": jax.devices()[0].device_kind,
        "model": args.model,
        "pool": f"{engine.num_pages} pages of {engine.layout.page_bytes(engine.dtype.itemsize) / 2**20:.3g} MiB",
        "table": [],
    }
    for load, workload in zip(loads, workloads):
        for name in systems:
            summary = summarise(run(engine, workload, name, settings)[0], args.ttft_slo)
            row = {"requests a second": load, "system": name, "requests": len(workload)}
            about["table"].append(row | {column: float(f"{summary[column]:.4g}") for column in COLUMNS})
            print(about["table"][-1], flush=True)
            if args.out is not None:
                publish(about, args.out, quiet=True)
    engine.close()
    publish(about, args.out)


if __name__ == "__main__":
    main()
