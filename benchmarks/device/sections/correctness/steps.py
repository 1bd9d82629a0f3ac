"""Whole model: prompts and then decode steps, the kernels beside the reference, with the same weights and tokens.

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
from chameleon_jax.models.runtime.step_inputs import SequenceChunk, pack_step

DECODE_STEPS = 4
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
        width = layout.pages_for_tokens(max(lengths) + DECODE_STEPS)
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

    def compile(self, graph: Any, params: Any, dtype: str, backend: str, decode: bool) -> Any:
        """Compile the program of a step, in float32 without tf32."""
        packed, program, _, _ = pack_step(self._chunks(int(decode)), {}, self.buckets)
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
        programs: dict[bool, Any],
        params: Any,
        head: jax.Array,
        dtype: str,
        given: Run | None,
        which: Sequence[int] = range(1 + DECODE_STEPS),
    ) -> Run:
        """Run prompts (step 0), then decode steps, by programs for not decoding and for decoding.

        The tokens of the run `given` are fed, or the run's own if it is None. A decode step without the prompts finds random
        numbers as its KV.
        """
        keys = jax.random.split(jax.random.key(9), self.layout.config.num_layers)
        pages = [self._page(key, dtype) for key in keys]
        slots = jnp.zeros(self.buckets.max_num_seqs + 1, jnp.int32)
        hiddens: list[np.ndarray] = []
        tokens: list[np.ndarray] = []
        for i, step in enumerate(which):
            packed, _, last, _ = pack_step(self._chunks(step), {}, self.buckets)
            found = programs[step > 0](params, pages, slots, packed)
            pages, hidden = found.pages, found.hidden[np.array(last)]
            hiddens.append(np.asarray(hidden, np.float32))
            tokens.append(np.asarray(logits(hidden, head).argmax(-1)))
            fed = (given.tokens if given else tokens)[i]
            slots = slots.at[np.arange(len(fed))].set(fed)
        return Run(hiddens, tokens)

    def _page(self, key: jax.Array, dtype: str) -> jax.Array:
        """Pool of a layer, with bfloat16's numbers in either dtype, like the weights."""
        numbers = jax.random.normal(key, (self.num_pages, self.layout.page_elems), jnp.bfloat16) * SCALE_OF_ROWS
        return numbers.astype(dtype)

    def _chunks(self, step: int) -> list[SequenceChunk]:
        """Chunks of the prompts, or of one more token of each."""
        rows = zip(self.prompts, self.tables, self.adapters)
        if step == 0:
            return [SequenceChunk(words, 0, i, table, adapter) for i, (words, table, adapter) in enumerate(rows)]
        return [SequenceChunk(None, len(words) + step - 1, i, table, adapter) for i, (words, table, adapter) in enumerate(rows)]


class WholeStep:
    """Runs to compare with one another."""

    def __init__(self, scale: Scale, report: Report):
        self._scale = scale
        self._backend = "triton" if on_gpu() else "blocked"
        self._sequences = Sequences(scale)
        runs = [("float32", "reference"), ("bfloat16", self._backend), ("float32", self._backend)]
        self._programs: dict[tuple[str, str, bool], Any] = {}
        jobs = {
            program_name(*run, decode): functools.partial(self._program, *run, decode)
            for run in runs
            for decode in (False, True)
        }
        self.compilation = Compilation(report, "correctness", jobs, lambda: self._parts)

    @functools.cached_property
    def _model(self) -> Any:
        return random_weights(self._scale.config, jnp.dtype("bfloat16"))

    @functools.cached_property
    def _parts(self) -> tuple[Any, Any]:
        """Graph and parameters, split once for all threads."""
        return nnx.split(self._model)

    def _program(self, dtype: str, backend: str, decode: bool) -> Any:
        """Compile a program unless it is there; this process may follow on another that compiled it."""
        key = (dtype, backend, decode)
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
        programs = {decode: self._program(dtype, backend, decode) for decode in (False, True)}
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
                    "step": "prompts" if step == 0 else f"decode {step}",
                    "error": f"{whole:.1e}",
                    "worst row": f"{worst(out, right):.1e}",
                    "limit": limit,
                    "same tokens": f"{same} of {len(right)}",
                    "ok": ok,
                }
            )
        return rows


def program_name(dtype: str, backend: str, decode: bool) -> str:
    return f"whole step, {dtype}, {backend}, {'decode' if decode else 'prompts'}"


def cases(scale: Scale, report: Report) -> tuple[Case, list[Case], list[Case]]:
    """Case that begins to compile; cases in bfloat16; cases in float32, which free the weights."""
    whole = WholeStep(scale, report)
    begin, waits = whole.compilation.begin("begin to compile the whole step"), whole.compilation.cases()
    return (
        begin,
        [*waits[:4], Case("whole step, bfloat16", whole.in_bfloat16)],
        [*waits[4:], Case("whole step, float32", whole.in_float32)],
    )
