"""Section `variants`: options and constants that a tuning run would try, each beside its prediction.

The model has few layers, so that its programs compile in seconds; the output matrix is in every figure. `as it is` comes first
and last: the difference between the two is noise. Predictions with a percentage for the adapters' division are measurements of
these kernels alone, from a sweep on an H200: 32 rows with mixed ranks on all seven matrices, 1 row with rank 16 on q k v o.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax

from benchmarks.device.report import Case, Report, Row, Skip
from benchmarks.device.scale import Mix, Scale, on_gpu
from benchmarks.device.timing import time_calls
from benchmarks.device.workbench import Workbench
from chameleon_jax.models.config import ATTENTION_TARGETS
from chameleon_jax.models.ops import pallas_triton
from chameleon_jax.models.ops.batched_lora import triton as lora
from chameleon_jax.models.ops.paged_attention import triton as attention

POOL_BYTES = 16 << 30


@dataclasses.dataclass(frozen=True)
class Variant:
    """Options of XLA, or constants of a kernel's module, with the expected effect.

    Attributes:
        since: First version of jax that knows the options.
    """

    name: str
    prediction: str
    options: tuple[tuple[str, Any], ...] = ()
    module: Any = None
    constants: tuple[tuple[str, Any], ...] = ()
    since: tuple[int, ...] = ()

    @property
    def exists(self) -> bool:
        return jax.__version_info__ >= self.since and all(hasattr(self.module, name) for name, _ in self.constants)

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Set the constants, and compile kernels with them: programs that are traced inside have them."""
        if not self.constants:
            yield
            return
        with mock.patch.multiple(self.module, **dict(self.constants)), pallas_triton.fresh_codes():
            yield


def xla(prediction: str, since: tuple[int, ...] = (), **options: Any) -> Variant:
    name = ", ".join(f"{k}={v!r}" for k, v in options.items())
    return Variant(name, prediction, options=tuple(options.items()), since=since)


def constant(module: Any, prediction: str, **constants: Any) -> Variant:
    op = module.__name__.split(".")[-2]
    name = f"{op}: " + ", ".join(f"{k} {getattr(module, k, '?')} -> {v}" for k, v in constants.items())
    return Variant(name, prediction, module=module, constants=tuple(constants.items()))


def division(prediction: str, **changes: int) -> Variant:
    """Divide the adapters' work in decode in another way."""
    name = "batched_lora, decode: " + ", ".join(f"{k} {getattr(lora.DECODE, k)} -> {v}" for k, v in changes.items())
    return Variant(name, prediction, module=lora, constants=(("DECODE", lora.DECODE._replace(**changes)),))


AS_IT_IS = Variant("as it is", "")
VARIANTS = (
    xla(
        "no update of a graph's nodes while no argument moves: the same, or up to 5 % faster at 1 row",
        since=(0, 11),
        xla_gpu_command_buffer_update_mode="SKIP_TEMP",
    ),
    xla("cuBLAS for all products: up to 10 % slower at 1 row, where Triton splits over d_in", xla_gpu_enable_triton_gemm=False),
    xla("slower at 1 row: a launch for each of some 12 kernels a layer, 2 to 4 us each", xla_gpu_enable_command_buffer=""),
    xla("the same by another way", xla_gpu_graph_min_graph_size=100_000),
    constant(lora, "too few loads in flight for one row's adapter: slower at 1 row", SHRINK_PROGRAMS=66),
    constant(lora, "two programs a multiprocessor: the same, within 1 % at 32 rows", SHRINK_PROGRAMS=264),
    constant(lora, "four: the same at 32 rows", SHRINK_PROGRAMS=528),
    division("d_in is not split: 37 % slower at 1 row, 14 % at 32", splits=1),
    division("more partial sums: 7 % slower at 1 row, 25 % at 32", splits=4),
    division("waits for addresses in turn: 19 % slower at 32 rows, 6 % faster at 1", rows=32),
    division("the same at 32 rows, 11 % slower at 1", rows=128),
    division("twice the programs: 4 % faster at 32 rows", columns=64),
    division("half the programs: 6 % slower at 32 rows", columns=256, num_warps=4),
    division("4 % slower at 32 rows", num_warps=4),
    constant(attention, "half the splits: fewer merges, too few loads in flight at 1 row", DECODE_PROGRAMS=132),
    constant(attention, "twice: faster at 1 row if latency binds", DECODE_PROGRAMS=528),
    constant(attention, "shorter shares: evens out lengths, more merges", SHARE_TOKENS=512),
    constant(attention, "smaller blocks of keys: fewer registers, more programs at once", BLOCK_BYTES=64),
    constant(attention, "larger: more bytes in flight a program", BLOCK_BYTES=256),
)
TUNING = (
    xla("no choice by measurement: 5 to 20 % slower", xla_gpu_autotune_level=0),
    xla("more tilings are tried: 0 to 5 % faster, compiles for minutes", xla_gpu_exhaustive_tiling_search=True),
)
"""Variants of the section `autotuning`, the longest last."""
LIMIT_SECONDS = 75.0


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    bench = workbench(scale)
    again = dataclasses.replace(AS_IT_IS, name="as it is, again")
    # without a GPU no variant changes anything
    variants = (AS_IT_IS, *(v for v in VARIANTS if v.exists), again) if on_gpu() else (AS_IT_IS,)
    return [Case(v.name, functools.partial(_row, bench, report, v), LIMIT_SECONDS) for v in variants]


def workbench(scale: Scale) -> Workbench:
    config = dataclasses.replace(scale.config, num_layers=scale.variant_layers)
    return Workbench(scale, config, None if scale.pool_bytes else POOL_BYTES)


def _row(bench: Workbench, report: Report, variant: Variant) -> list[Row]:
    return [beside(measure(bench, variant), report)]


def beside(row: Row, report: Report) -> Row:
    """Row with the ratio of each time to the time without changes, if that was measured."""
    before = report.find("variants", variant=AS_IT_IS.name) or {}
    result: Row = {}
    for name, value in row.items():
        result[name] = value
        if name.endswith(": ms"):
            base = before.get(name, value)
            result[name.removesuffix("ms") + "ratio"] = round(value / base, 3) if value and base else ""
    return result


def measure(bench: Workbench, variant: Variant) -> Row:
    """Measure decode steps of few rows with long contexts, and of many with short ones, in milliseconds."""
    scale = bench.scale
    few, many = scale.rows[0], scale.rows[len(scale.rows) // 2]
    mixes = [Mix("base"), Mix("mixed, q k v o", scale.ranks, ATTENTION_TARGETS)]
    changed = {attention: mixes[:1], lora: mixes[1:]}.get(variant.module, mixes)
    buckets = bench.buckets()
    programs = bench.programs(buckets, dict(variant.options))
    row: Row = {"variant": variant.name, "prediction": variant.prediction}
    steps = [(*shape, mix) for mix in mixes for shape in ((few, scale.contexts[-1]), (many, scale.contexts[0]))]
    run = {}
    for step in steps:
        if step[2] in changed:
            with contextlib.suppress(Skip):
                run[step] = bench.decode(*step)
    with bench.using(buckets, programs) as engine:
        with variant.in_force():
            _, seconds = engine.prepare(run.values())
        for step in steps:
            ms = round(time_calls(engine.packed(run[step])).ms, 4) if step in run else ""
            row[f"{step[0]} x {step[1]}, {step[2].name}: ms"] = ms
    return {**row, "s to compile": round(seconds, 1)}
