"""Section `autotuning`: XLA's options for how it chooses kernels, each in a process of its own without earlier choices.

XLA keeps its choices by kernel and not by how they were found, in memory and on disk: in the process of the section `variants`
these options would change nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys

from benchmarks.device import MEMORY_SHARE

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_SHARE))

from benchmarks.device import processes
from benchmarks.device.report import Case, Report, Row
from benchmarks.device.scale import FULL, SMALL, Scale
from benchmarks.device.variants import AS_IT_IS, TUNING, beside, measure, workbench

LIMIT_SECONDS = 120.0


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    variants = TUNING if scale == FULL else TUNING[:1]
    return [
        Case(variant.name, functools.partial(_apart, i, scale, report, deadline), LIMIT_SECONDS + 10)
        for i, variant in enumerate(variants)
    ]


def _apart(index: int, scale: Scale, report: Report, deadline: float) -> list[Row]:
    command = [sys.executable, "-m", "benchmarks.device.autotuning", str(index)] + ["--small"] * (scale != FULL)
    environment = os.environ | {"JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none"}
    why, lines = processes.run_json(command, environment, processes.seconds_until(deadline, LIMIT_SECONDS))
    if why is not None:
        return [{"variant": TUNING[index].name, "skipped": why}]
    before = next((row for row in report.rows("variants") if row["variant"] == AS_IT_IS.name), {})
    return [beside(json.loads(lines[-1]), before)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("index", type=int)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    print(json.dumps(measure(workbench(SMALL if args.small else FULL), TUNING[args.index])), flush=True)
