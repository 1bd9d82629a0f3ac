"""Section `correctness`: every op, then the whole step, against the reference."""

from __future__ import annotations

from benchmarks.device.report import Case, Report
from benchmarks.device.scale import Scale
from benchmarks.device.sections.correctness import ops, sampling, steps


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    """Cases of the ops that the model uses, of the model, then of grouped heads and float32, which it does not use."""
    begin, in_bfloat16, in_float32 = steps.cases(scale, report)
    first, rest = scale.checks[:1], scale.checks[1:]
    return [
        begin,
        *ops.cases(scale, first),
        *in_bfloat16,
        *sampling.cases(scale),
        *ops.cases(scale, rest),
        *in_float32,
    ]
