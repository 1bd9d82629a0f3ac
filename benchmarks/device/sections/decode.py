"""Section `decode`: whole steps of decode rows, forward and sampling, dispatched back to back."""

from __future__ import annotations

import contextlib
import enum
import functools
import time
from collections.abc import Sequence

from benchmarks.device import predictions
from benchmarks.device.compilation import Compilation
from benchmarks.device.report import Case, Report, Row, Skip
from benchmarks.device.scale import Mix, Scale
from benchmarks.device.sections.machine import ceilings, device_kind
from benchmarks.device.timing import Timing, columns, time_calls
from benchmarks.device.workbench import Workbench, shared

FIRST_ROWS = (32, 128, 1)
"""The most valuable steps, which are predicted; their programs are compiled first."""


class Order(enum.IntEnum):
    """Priorities of the cases of decode and prefill, which share a process, by value.

    Programs are compiled in two rounds, and nothing is measured meanwhile: XLA chooses kernels by their time on the device.
    """

    BEGIN = 0
    COMPILE = 1
    DECODE = 2
    PREFILL = 3
    BEGIN_MORE = 4
    COMPILE_MORE = 5
    DECODE_MORE = 6
    LONG = 7
    PREFILL_MORE = 8
    REST = 9


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    bench = shared(scale)
    first = [rows for rows in FIRST_ROWS if rows in scale.rows]
    rest = [rows for rows in scale.rows if rows not in first]
    programs, more = programs_of(bench, report, first), programs_of(bench, report, rest)

    def build() -> list[Row]:
        begin = time.perf_counter()
        pages = bench.engine.num_pages
        seconds = round(time.perf_counter() - begin, 1)
        tokens = pages * bench.layout.page_tokens
        return [{"pages of the pool": pages, "tokens of KV that they hold": tokens, "s to build": seconds}]

    def scratch() -> list[Row]:
        return [{"programs": len(bench.engine.programs.forward), "MiB of scratch": round(scratch_bytes(bench) / 2**20, 1)}]

    found = [
        Case("engine", build, 90.0, Order.BEGIN),
        programs.begin("begin to compile", Order.BEGIN),
        *programs.cases(Order.COMPILE),
        more.begin("begin to compile more", Order.BEGIN_MORE),
        *more.cases(Order.COMPILE_MORE),
        Case("scratch", scratch, 60.0, Order.REST),
    ]
    for context in scale.contexts:
        for rows in (*first, *rest):
            order = Order.DECODE if rows in first else Order.DECODE_MORE
            if context != scale.contexts[0]:
                order = Order.LONG
            for mix in scale.mixes:
                name = f"{rows} rows, {context} tokens, {mix.name}"
                run = functools.partial(measure, bench, report, programs if rows in first else more, rows, context, mix)
                found.append(Case(name, run, 60.0, order))
    return found


def programs_of(bench: Workbench, report: Report, sizes: Sequence[int]) -> Compilation:
    """Compilation of a program for each number of rows and of adapted targets."""
    scale = bench.scale

    def compile_step(rows: int, mix: Mix) -> None:
        with contextlib.suppress(Skip):
            bench.engine.compile(bench.decode(rows, scale.contexts[0], mix))

    jobs = {program_name(rows, mix): functools.partial(compile_step, rows, mix) for rows in sizes for mix in scale.mixes}
    return Compilation(report, "decode", jobs, lambda: bench.engine)


def program_name(rows: int, mix: Mix) -> str:
    """Name of a program, which mixes of the same targets share."""
    return f"{rows} rows, {len(mix.targets) if mix.ranks else 'no'} adapted targets"


def scratch_bytes(bench: Workbench) -> int:
    """Most bytes that a forward program needs besides its arguments."""
    analyses = [program.memory_analysis() for program in bench.engine.programs.forward.values()]
    return max((a.temp_size_in_bytes for a in analyses if a is not None), default=0)


def measure(bench: Workbench, report: Report, programs: Compilation, rows: int, context: int, mix: Mix) -> list[Row]:
    """Measure a step as serving sees it (`ms`), and without the host's part, which may be longer (`device ms`)."""
    row: Row = {"rows": rows, "context": context, "adapters": mix.name}
    if programs.failed(program_name(rows, mix)):
        raise Skip("its program does not compile")
    batch = bench.decode(rows, context, mix)
    floor = batch.floor_bytes / ceilings(bench.scale, report)["copy"]
    step = time_calls(bench.run(batch))
    device = time_calls(bench.engine.packed(batch))
    predicted = predictions.decode_ms(device_kind(), rows, context, mix.name)
    base = report.find("decode", rows=rows, context=context, adapters="base")
    return [
        {
            **row,
            **columns(step, device, floor, predicted),
            "ratio to base": round(step.ms / base["ms"], 3) if base else 1.0,
            "device ratio": round(device.ms / base["device ms"], 3) if base else 1.0,
            "note": "; ".join([batch.note] * bool(batch.note) + bound_by_host(step, device)),
        }
    ]


def bound_by_host(step: Timing, device: Timing) -> list[str]:
    """List notes on figures that the host determines."""
    return ["ms is the host's"] * step.host_bound + ["device ms too"] * device.host_bound
