"""Command line of all benchmarks: `python -m benchmarks` lists them, `python -m benchmarks NAME --help` explains one.

A benchmark's module is imported when it is chosen, because some machines lack packages that only others need.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

BENCHMARKS = {
    "demo": ("demo.demo", "Serve a stream of requests with one model and four adapters."),
    "demo-texts": ("demo.texts", "Write the public-domain texts that the demo's adapters are trained on."),
    "workload": ("workload", "Print the statistics of a workload beside the statistics of Azure's trace."),
    "simulate": ("simulator.simulate", "Serve one workload on simulated hardware with several systems in turn."),
    "padding": (
        "simulator.padding",
        "Compare schedulers that know a device's step sizes with schedulers that do not, simulated.",
    ),
    "slow-devices": ("simulator.slow_devices", "Compare a system with first come first served on slow devices, simulated."),
    "s-lora": ("simulator.s_lora", "Compare a simulation of S-LoRA's loop with points that its authors measured on an A10G."),
    "paper": ("paper.reproduce", "Reproduce the figures of the Chameleon paper in simulation."),
    "serve": ("serving.serve", "Serve a workload on the engine with several systems, and compare them."),
    "serve-curve": ("serving.serve_curve", "Measure time to first token against load on the engine."),
    "mixed": (
        "serving.mixed",
        "Measure throughput while prompts arrive among decoding rows, also beside another checkout.",
    ),
    "start": ("serving.start", "Measure a server's start with an empty compilation cache and with a full one."),
    "overhead": ("overhead.overhead", "Measure the cost of HTTP and gRPC beside the bare serving loop."),
    "load-generator": ("overhead.load_generator", "Put a public load generator, guidellm, on the HTTP server."),
    "packing-cost": ("overhead.packing_cost", "Measure the host time to pack a decode step of Llama-7B."),
    "scheduler-cost": ("overhead.scheduler_cost", "Measure the processor time of scheduler and cache for one step."),
    "ops": ("kernels.ops", "Measure device ops on this CPU beside their floors and their alternatives."),
    "lora-cost": ("kernels.lora_cost", "Measure the cost of adapters in a decode step on this machine."),
    "compile-h100": ("kernels.compile_h100", "Compile the model's steps for an NVIDIA H100, without a GPU."),
    "device": ("device.command", "Check and measure everything on one GPU, in three calls of ten minutes."),
    "soak": ("soak.soak", "Serve 64 clients for minutes while adapters come and go."),
    "peers": ("peers.compare", "Compare CPU throughput with vLLM and with transformers + peft."),
}
"""Name of each benchmark, its module in this package, and the first line of its help."""
UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # newer versions of typer bring a click of their own


def main(words: Sequence[str]) -> int:
    """Run one benchmark; the exit code is 2 and the message one line where the command line is wrong."""
    name, *options = words or ["--help"]
    if name == "--help":
        Console(width=120).print(listing())
        return 0
    if name not in BENCHMARKS:
        return refuse("python -m benchmarks", f"no benchmark is named {name!r}; allowed: {', '.join(BENCHMARKS)}")
    program = f"python -m benchmarks {name}"
    try:
        return command(name).main(options, program, standalone_mode=False) or 0
    except UsageError as error:
        return refuse(program, error.format_message())  # type: ignore[attr-defined]


def command(name: str) -> Any:
    """Make the command of a benchmark, with its arguments and options."""
    app = typer.Typer(add_completion=False)
    app.command()(importlib.import_module(f"benchmarks.{BENCHMARKS[name][0]}").main)
    return typer.main.get_command(app)


def refuse(program: str, why: str) -> int:
    print(f"{program}: {' '.join(why.split())}", file=sys.stderr)
    return 2


def listing() -> Table:
    table = Table("python -m benchmarks", "", box=None)
    for name, (_, summary) in BENCHMARKS.items():
        table.add_row(name, summary)
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
