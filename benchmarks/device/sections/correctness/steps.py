"""Whole model: prompts, decode steps, then a step of both, the kernels beside the reference, with the same weights and tokens.

Weights are bfloat16's, so that the model in float32 is the same function and shows the error of bfloat16.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.device.bench_engine import SCALE_OF_ROWS, random_weights
from benchmarks.device.compilation import Compilation
from benchmarks.device.report import Case, Report, Row
from benchmarks.device.scale import Scale, on_gpu
from benchmarks.device.sections.correctness.ops import worst
from chameleon_jax.models.config import TARGETS
from chameleon_jax.models.llama import logits
from chameleon_jax.models.page_layout import PageLayout, PlacedAdapter
from chameleon_jax.models.runtime import steps
from chameleon_jax.models.runtime.buckets import StepBuckets, shapes_for
from chameleon_jax.models.runtime.step_inputs import PackedStep, SamplingRow, SequenceChunk, pack_step

PROMPTS, MIXED = 0, 5
"""Step of prompts, and step in which some sequences have prompts while others decode. In the steps between, all decode."""
KINDS = ("prompts", "decode", "mixed")
STEP_LIMIT = 1e-3
"""Largest error of float32 after all layers, whose roundings add up."""
BFLOAT16_LIMIT = 5e-2


@dataclasses.dataclass(frozen=True)
class Run:
    """Hidden states `[rows, hidden]` and next tokens `[rows]` of each step of a run."""

    hidden: list[np.ndarray]
    tokens: list[np.ndarray]


class Sequences:
    """Prompts with adapters of mixed ranks on all targets, one without, and their pages of the pool.

    Args:
        adapted: Whether prompts have adapters.
    """

    def __init__(self, scale: Scale, adapted: bool = True):
        rng = np.random.default_rng(5)
        self.layout = layout = PageLayout.for_model(scale.config)
        tile = scale.prefill_tile
        lengths = [tile, 2 * tile + 3, tile - 1, 1, 2 * tile, tile // 2][: len(scale.ranks) + 1]
        self.prompts = [rng.integers(0, scale.config.vocab_size, n).tolist() for n in lengths]
        width = layout.pages_for_tokens(max(lengths) + MIXED)
        placements = [layout.place(dict.fromkeys(TARGETS, rank)) for rank in scale.ranks]
        self.num_pages = 1 + len(lengths) * width + sum(p.num_pages for p in placements)
        deal = iter((1 + rng.permutation(self.num_pages - 1)).tolist())
        self.tables = [tuple(itertools.islice(deal, width)) for _ in lengths]
        placed = [PlacedAdapter(p, tuple(itertools.islice(deal, p.num_pages))) for p in placements]
        self.adapters: list[PlacedAdapter | None] = [*placed, None] if adapted else [None] * len(lengths)
        tiles = sum(-(-n // tile) for n in lengths) + 1  # and padding
        self.buckets = StepBuckets(
            max_num_seqs=len(lengths) + 2,
            max_prefill_tokens=tiles * tile,
            table_width=width,
            max_rank=max(scale.ranks),
            max_adapter_pages=max(p.num_pages for p in placements),
            **shapes_for("triton") | {"prefill_tile": tile},
        )

    def compile(self, graph: Any, params: Any, dtype: str, backend: str, kind: str) -> Any:
        """Compile the program of a kind of step, in float32 without tf32."""
        packed, program, _, _ = self._pack(next(step for step in range(1 + MIXED) if kind_of(step) == kind))
        forward = functools.partial(
            steps.forward, graph, program=program, buckets=self.buckets, layout=self.layout, backend=backend
        )
        wide = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), params)
        pool = [jax.ShapeDtypeStruct((self.num_pages, self.layout.page_elems), dtype)] * self.layout.config.num_layers
        slots = jax.ShapeDtypeStruct((self.buckets.max_num_seqs + 1,), jnp.int32)
        with jax.default_matmul_precision("highest" if dtype == "float32" else None):  # a thread's own setting
            return jax.jit(forward, donate_argnums=1).lower(wide, pool, slots, packed).compile()

    def run(
        self,
        programs: dict[str, Any],
        params: Any,
        head: jax.Array,
        dtype: str,
        given: Run | None,
        which: Sequence[int] = range(1 + MIXED),
    ) -> Run:
        """Run steps, by programs for each kind.

        The tokens of the run `given` are fed, or the run's own if it is None. A step without those before it finds random
        numbers as its KV.
        """
        keys = jax.random.split(jax.random.key(9), self.layout.config.num_layers)
        pages = [self._page(key, dtype) for key in keys]
        slots = jnp.zeros(self.buckets.max_num_seqs + 1, jnp.int32)
        hiddens: list[np.ndarray] = []
        tokens: list[np.ndarray] = []
        for i, step in enumerate(which):
            found = programs[kind_of(step)](params, pages, slots, self._pack(step).packed)
            pages, hidden = found.pages, found.hidden[: len(self.prompts)]
            hiddens.append(np.asarray(hidden, np.float32))
            tokens.append(np.asarray(logits(hidden, head).argmax(-1)))
            fed = (given.tokens if given else tokens)[i]
            slots = slots.at[np.array([chunk.slot for chunk in self._chunks(step)])].set(fed)
        return Run(hiddens, tokens)

    def _page(self, key: jax.Array, dtype: str) -> jax.Array:
        """Pool of a layer, with bfloat16's numbers in either dtype, like the weights."""
        numbers = jax.random.normal(key, (self.num_pages, self.layout.page_elems), jnp.bfloat16) * SCALE_OF_ROWS
        return numbers.astype(dtype)

    def _pack(self, step: int) -> PackedStep:
        """Pack a step in which every sequence samples."""
        chunks = self._chunks(step)
        row = SamplingRow(0, 0, 0, 0.0, 0, 1.0, 0.0, (), False)
        return pack_step(chunks, dict.fromkeys(range(len(chunks)), row), self.buckets)

    def _chunks(self, step: int) -> list[SequenceChunk]:
        """List chunks of the prompts, of one more token of each, or of one more of some and the latter halves of the others."""
        rows = list(enumerate(zip(self.prompts, self.tables, self.adapters)))
        if step == PROMPTS:
            return [SequenceChunk(words, 0, i, table, adapter) for i, (words, table, adapter) in rows]
        more = [SequenceChunk(None, len(words) + step - 1, i, table, adapter) for i, (words, table, adapter) in rows]
        if step < MIXED:
            return more
        halves = [
            SequenceChunk(words[len(words) // 2 :], len(words) // 2, i, table, adapter) for i, (words, table, adapter) in rows
        ]
        return [*more[::2], *halves[1::2]]


class WholeStep:
    """Runs to compare with one another."""

    def __init__(self, scale: Scale, report: Report):
        self._scale = scale
        self._backend = "triton" if on_gpu() else "blocked"
        self._sequences = Sequences(scale)
        runs = [("float32", "reference"), ("bfloat16", self._backend), ("float32", self._backend)]
        self._programs: dict[tuple[str, str, str], Any] = {}
        jobs = {program_name(*run, kind): functools.partial(self._program, *run, kind) for run in runs for kind in KINDS}
        self.compilation = Compilation(report, "correctness", jobs, lambda: self._parts)

    @functools.cached_property
    def _model(self) -> Any:
        return random_weights(self._scale.config, jnp.dtype("bfloat16"))

    @functools.cached_property
    def _parts(self) -> tuple[Any, Any]:
        """Graph and parameters, split once for all threads."""
        return nnx.split(self._model)

    def _program(self, dtype: str, backend: str, kind: str) -> Any:
        """Compile a program unless it is there; this process may follow on another that compiled it."""
        key = (dtype, backend, kind)
        if self.compilation.failed(program_name(*key)):
            raise RuntimeError(f"{program_name(*key)}: it does not compile")
        if key not in self._programs:
            graph, params = self._parts
            self._programs[key] = self._sequences.compile(graph, params, *key)
        return self._programs[key]

    @functools.cached_property
    def _reference(self) -> Run:
        wide, head = self._wide()
        with jax.default_matmul_precision("highest"):
            return self._run("reference", wide, head, "float32", None)

    def _wide(self) -> tuple[Any, jax.Array]:
        """Weights and output matrix in float32."""
        graph, params = self._parts
        wide = jax.tree.map(lambda a: a.astype(jnp.float32), params)
        return wide, nnx.merge(graph, wide).output_matrix

    def in_float32(self) -> list[Row]:
        reference = self._reference
        gc.collect()
        wide, head = self._wide()
        with jax.default_matmul_precision("highest"):
            run = self._run(self._backend, wide, head, "float32", reference)
        del wide, head
        self._free()
        return self._compare(run, "float32", STEP_LIMIT)

    def in_bfloat16(self) -> list[Row]:
        reference = self._reference
        gc.collect()
        run = self._run(self._backend, self._parts[1], self._model.output_matrix, "bfloat16", reference)
        return self._compare(run, "bfloat16", BFLOAT16_LIMIT)

    def _free(self) -> None:
        """Free weights and programs, after the last run."""
        del self._model, self._parts
        self._programs = {}
        gc.collect()

    def _run(self, backend: str, params: Any, head: jax.Array, dtype: str, given: Run | None) -> Run:
        programs = {kind: self._program(dtype, backend, kind) for kind in KINDS}
        return self._sequences.run(programs, params, head, dtype, given)

    def _compare(self, run: Run, dtype: str, limit: float) -> list[Row]:
        rows: list[Row] = []
        for step, (out, right) in enumerate(zip(run.hidden, self._reference.hidden)):
            whole = float(np.linalg.norm(out - right) / np.linalg.norm(right))
            same = int((run.tokens[step] == self._reference.tokens[step]).sum())
            ok = whole < limit and (dtype != "float32" or same == len(right))  # NaN is not less than anything
            rows.append(
                {
                    "whole model": f"{dtype} {self._backend} against float32 reference",
                    "step": f"decode {step}" if kind_of(step) == "decode" else kind_of(step),
                    "error": f"{whole:.1e}",
                    "worst row": f"{worst(out, right):.1e}",
                    "limit": limit,
                    "same tokens": f"{same} of {len(right)}",
                    "ok": ok,
                }
            )
        alone = run.hidden[PROMPTS][1::2]
        error = worst(run.hidden[MIXED][-len(alone) :], alone)
        name = f"{dtype} {self._backend}, prompts beside rows against prompts alone"
        return [*rows, {"whole model": name, "step": "mixed", "worst row": f"{error:.1e}", "limit": limit, "ok": error < limit}]


def kind_of(step: int) -> str:
    return {PROMPTS: "prompts", MIXED: "mixed"}.get(step, "decode")


def program_name(dtype: str, backend: str, kind: str) -> str:
    return f"whole step, {dtype}, {backend}, {kind}"


def cases(scale: Scale, report: Report) -> tuple[Case, list[Case], list[Case]]:
    """Case that begins to compile; cases in bfloat16; cases in float32, which free the weights."""
    whole = WholeStep(scale, report)
    begin, waits = whole.compilation.begin("begin to compile the whole step"), whole.compilation.cases()
    first = 2 * len(KINDS)  # of the reference and of bfloat16
    return (
        begin,
        [*waits[:first], Case("whole step, bfloat16", whole.in_bfloat16)],
        [*waits[first:], Case("whole step, float32", whole.in_float32)],
    )
