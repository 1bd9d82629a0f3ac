"""S-LoRA's loop, simulated, beside its authors' measurements on an A10G.

The ten points are numbers of S-LoRA's repository (Apache-2.0, commit c1ddf48, benchmarks/paper/synthetic/slora). Its workloads
are drawn by NumPy's legacy generator from one seed, so that they can be drawn again here: the same requests arrive at the same
times.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.machine import Out, describe, publish
from benchmarks.simulator.cost_model import PROFILES
from benchmarks.simulator.simulate import Result, simulate
from benchmarks.workload import Workload

FILE = Path(__file__).with_name("s_lora_a10g.json")
SEED = 42
DURATION_S = 300
LENGTHS = (8, 512)


class Point(NamedTuple):
    """One of the measured points.

    Attributes:
        ranks: Ranks of the adapters, which take them in turn.
        req_rate: Requests a second.
        num_adapters: Adapters that requests name, all equally often.
        avg_latency_s: Mean time to the last token.
        avg_first_token_latency_s: Mean time to the first token.
        throughput_rps: Requests over the time to the last one's end.
    """

    setting: str
    ranks: list[int]
    req_rate: float
    num_adapters: int
    avg_latency_s: float
    avg_first_token_latency_s: float
    throughput_rps: float


def points() -> list[Point]:
    """Read the measured points."""
    return [Point(**point) for point in json.loads(FILE.read_text())["points"]]


def workload(point: Point) -> Workload:
    """Draw a point's requests as S-LoRA's benchmark does."""
    rng, count = np.random.RandomState(SEED), int(point.req_rate * DURATION_S)
    adapter = (rng.power(1.0, count) * point.num_adapters).astype(np.int64)
    inputs, outputs = (rng.randint(*LENGTHS, count) for _ in range(2))
    arrival_s = np.cumsum(rng.gamma(1.0, 1 / point.req_rate, count))
    return Workload(arrival_s, inputs, outputs, adapter, np.resize(np.array(point.ranks), point.num_adapters))


def serve(point: Point) -> Result:
    """Serve a point's requests by S-LoRA's loop on the modelled A10G."""
    return simulate(
        workload(point), PROFILES["a10g-s-lora"], "s-lora-published", predictor="oracle", length_factor=1.0, max_num_seqs=1000
    )


def row(point: Point) -> dict[str, Any]:
    """Compare a point with its simulation."""
    result = serve(point)
    throughput = len(result.ttft) / result.finished_s
    return {
        "setting": f"{point.setting}, {point.num_adapters} adapters, {point.req_rate:g} requests/s",
        "throughput, measured": round(point.throughput_rps, 3),
        "throughput, simulated": round(throughput, 3),
        "difference": f"{throughput / point.throughput_rps - 1:+.1%}",
        "latency s, measured": round(point.avg_latency_s, 1),
        "latency s, simulated": round(float(result.e2e.mean()), 1),
        "first token s, measured": round(point.avg_first_token_latency_s, 2),
        "first token s, simulated": round(float(result.ttft.mean()), 2),
    }


def main(out: Out = None) -> None:
    """Compare a simulation of S-LoRA's loop with points that its authors measured on an A10G."""
    publish(describe() | {"simulated": "a10g-s-lora", "table": [row(point) for point in points()]}, out)
