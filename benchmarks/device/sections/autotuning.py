"""Section `autotuning`: XLA's options for choosing kernels, each in a process of its own without earlier choices.

XLA keeps its choices in memory and on disk, by kernel and not by the options that led to them: in the process of the section
`variants` these options would change nothing.
"""

from __future__ import annotations

import functools
import json
import os
import sys

from benchmarks.device import processes
from benchmarks.device.report import Case, Report, Row, Skip
from benchmarks.device.scale import FULL, SCALES, Scale
from benchmarks.device.sections.variants import TUNING, beside, measure, workbench

LIMIT_SECONDS = 120.0


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    variants = TUNING if scale == FULL else TUNING[:1]
    return [
        Case(variant.name, functools.partial(_apart, i, scale, report, deadline), LIMIT_SECONDS + 10)
        for i, variant in enumerate(variants)
    ]


def _apart(index: int, scale: Scale, report: Report, deadline: float) -> list[Row]:
    command = [sys.executable, "-m", "benchmarks.device.sections.autotuning", str(index), scale.name]
    environment = os.environ | {"JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none"}
    why, lines = processes.run_json(command, environment, processes.seconds_until(deadline, LIMIT_SECONDS))
    if why is not None:
        raise Skip(why)
    return [beside(json.loads(lines[-1]), report)]


if __name__ == "__main__":
    print(json.dumps(measure(workbench(SCALES[sys.argv[2]]), TUNING[int(sys.argv[1])])), flush=True)
