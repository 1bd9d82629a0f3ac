"""Section `decode`: whole steps of decode rows, forward and sampling, dispatched back to back."""

from __future__ import annotations

import functools

from benchmarks.device.machine import ceilings
from benchmarks.device.report import Case, Report, Row
from benchmarks.device.scale import Mix, Scale
from benchmarks.device.timing import Timing, time_calls
from benchmarks.device.workbench import Workbench, shared


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    bench = shared(scale)

    def compile_programs() -> list[Row]:
        engine = bench.engine
        steps = [bench.decode(rows, scale.contexts[0], mix) for rows in reversed(scale.rows) for mix in scale.mixes]
        programs, seconds = engine.prepare(step for step in steps if not isinstance(step, str))
        facts = {
            "forward programs": programs,
            "seconds to compile": round(seconds, 1),
            "pages of the pool": engine.num_pages,
            "tokens of KV that they hold": engine.num_pages * bench.layout.page_tokens,
            "MiB of scratch": round(scratch_bytes(bench) / 2**20, 1),
        }
        return [facts]

    found = [Case("compile", compile_programs)]
    for context in scale.contexts:
        for rows in scale.rows:
            for mix in scale.mixes:
                name = f"{rows} rows, {context} tokens, {mix.name}"
                found.append(Case(name, functools.partial(measure, bench, report, rows, context, mix)))
    return found


def scratch_bytes(bench: Workbench) -> int:
    """The most that a forward program needs besides its arguments."""
    analyses = [program.memory_analysis() for program in bench.engine.programs.forward.values()]
    return max((a.temp_size_in_bytes for a in analyses if a is not None), default=0)


def measure(bench: Workbench, report: Report, rows: int, context: int, mix: Mix) -> list[Row]:
    """`ms` is what serving would see; `device ms` is without the host's part, which may be longer than the step."""
    row: Row = {"rows": rows, "context": context, "adapters": mix.name}
    batch = bench.decode(rows, context, mix)
    if isinstance(batch, str):
        return [{**row, "skipped": batch}]
    floor = batch.floor_bytes / ceilings(bench.scale, report)["copy"]
    step = time_calls(bench.run(batch))
    device = time_calls(bench.engine.packed(batch))
    base = next((r for r in report.rows("decode") if base_of(r, rows, context)), None)
    return [
        {
            **row,
            "ms": round(step.ms, 3),
            "spread %": round(100 * step.spread, 1),
            "device ms": round(device.ms, 3),
            "host ms": round(step.host_ms, 3),
            "floor ms": round(floor * 1e3, 3),
            "% of floor": round(100 * floor / step.seconds, 1),
            "ratio to base": round(step.ms / base["ms"], 3) if base else 1.0,
            "device ratio": round(device.ms / base["device ms"], 3) if base else 1.0,
            "note": "; ".join([batch.note] * bool(batch.note) + bound_by_host(step, device)),
        }
    ]


def bound_by_host(step: Timing, device: Timing) -> list[str]:
    """What must be said of figures that the host decides."""
    return ["ms is the host's"] * step.host_bound + ["device ms too"] * device.host_bound


def base_of(row: Row, rows: int, context: int) -> bool:
    """Whether a row of the table is the one without adapters that others are compared with."""
    return row.get("rows") == rows and row.get("context") == context and row["adapters"] == "base" and "ms" in row
