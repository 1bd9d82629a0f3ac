"""Section `correctness`: every op, then the whole step, against the reference."""

from __future__ import annotations

from benchmarks.device import correct_ops, correct_sampling, correct_steps
from benchmarks.device.report import Case, Report
from benchmarks.device.scale import Scale


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    """The ops that the model uses, the model, then what it does not use: grouped heads and float32."""
    begin, in_bfloat16, in_float32 = correct_steps.cases(scale, report)
    first, rest = scale.checks[:1], scale.checks[1:]
    return [
        begin,
        *correct_ops.cases(scale, first),
        *in_bfloat16,
        *correct_sampling.cases(scale),
        *correct_ops.cases(scale, rest),
        *in_float32,
    ]
