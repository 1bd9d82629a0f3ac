"""Section `correctness`: every op, then the whole step, against the reference."""

from __future__ import annotations

from benchmarks.device import correct_ops, correct_steps
from benchmarks.device.report import Case, Report
from benchmarks.device.scale import Scale


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    return [*correct_ops.cases(scale), *correct_steps.cases(scale, report)]
