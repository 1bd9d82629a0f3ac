"""Section `ops`: attention, adapters, matrices and sampling alone, over the layers of the engine's own weights and pool.

Milliseconds a layer stand beside the layer's floor: the longer of its bytes over the copy bandwidth and its operations over the
matrix rate. Arguments are on the device and programs are compiled for a step's shapes; a step adds norms, rotary embedding and
the time between launches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device.bench_engine import Batch
from benchmarks.device.compilation import threads
from benchmarks.device.report import Case, Report, Row
from benchmarks.device.scale import Mix, Scale
from benchmarks.device.sections.machine import ceilings
from benchmarks.device.timing import Timing, time_calls
from benchmarks.device.workbench import Workbench, shared
from benchmarks.kernels.cases import GROUPS
from chameleon_jax.models import ops
from chameleon_jax.models.ops.batched_lora import batched_lora
from chameleon_jax.models.ops.batched_lora.plan import LoraTargets, resolve
from chameleon_jax.models.ops.linear import linear
from chameleon_jax.models.ops.paged_attention import paged_attention, write_kv
from chameleon_jax.models.ops.sampling import SamplingMode
from chameleon_jax.models.runtime.buckets import TILE_COLUMNS, Sampling
from chameleon_jax.models.runtime.step_inputs import SamplingRow, pack_sampling_rows, pack_step

RESULT_BYTES = 1 << 30
Programs = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    bench = shared(scale)
    alone = Alone(bench, report)
    few, most = scale.rows[0], scale.rows[-1]
    middle = scale.rows[len(scale.rows) // 2]
    found = [
        Case(f"attention, {rows} rows, {context} tokens", functools.partial(alone.attention, rows, context))
        for rows in dict.fromkeys((few, middle, most))
        for context in scale.contexts
    ]
    found += [
        Case(f"matrices, {rows} rows", functools.partial(alone.matrices, rows)) for rows in (*scale.rows, scale.prompt_tokens)
    ]
    for rows in dict.fromkeys((middle, few, most)):
        for mix in scale.mixes[2:]:
            found.append(Case(f"adapters, {rows} rows, {mix.name}", functools.partial(alone.adapters, rows, mix)))
    found.append(Case("prefill", alone.prefill))
    found += [
        Case(f"sampling, {rows} rows", functools.partial(alone.sampling, rows)) for rows in dict.fromkeys((few, middle, most))
    ]
    found.append(Case("write_kv", alone.writes))
    return found


class Alone:
    """Measurements of each op by itself."""

    def __init__(self, bench: Workbench, report: Report):
        self._bench, self._report = bench, report
        self._config = bench.config
        self._attend = functools.partial(paged_attention, num_kv_heads=bench.config.num_kv_heads, backend=ops.default_backend())
        self._adapt = functools.partial(batched_lora, backend=ops.default_backend())

    def attention(self, rows: int, context: int) -> list[Row]:
        batch = self._bench.decode(rows, context, Mix("base"))
        token_bytes = self._bench.token_bytes / self._config.num_layers
        flops = 4 * rows * context * self._config.num_heads * self._config.head_dim
        name = f"attention, {rows} rows, {context} tokens"
        layers = self._layers(0)
        return self._measure({name: self._attention_of(batch, layers)}, {name: (rows * context * token_bytes, flops)}, layers)

    def matrices(self, rows: int) -> list[Row]:
        """Measure each matrix of a layer, every layer with its own inputs, or XLA would make one product of several."""
        programs: Programs = {}
        work = {}
        layers = self._layers(rows * 2 * self._config.intermediate_size)
        for name in ("qkv", "o", "gate_up", "down"):
            weights = [getattr(layer, name).weight[...] for layer in list(self._bench.model.layers)[:layers]]
            d_out, d_in = weights[0].shape
            xs = [self._normal(i, (rows, d_in)) for i in range(layers)]
            label = f"{name} [{d_out}, {d_in}], {rows} rows"
            programs[label] = (lambda xs, ws: [linear(x, w) for x, w in zip(xs, ws)], (xs, weights))
            work[label] = (self._size(d_out * d_in + rows * (d_in + d_out)), 2 * rows * d_in * d_out)
        return self._measure(programs, work, layers)

    def adapters(self, rows: int, mix: Mix) -> list[Row]:
        batch = self._bench.decode(rows, self._bench.layout.page_tokens, mix)
        return self._adapters_of(batch, rows, f"{rows} rows, {mix.name}")

    def prefill(self) -> list[Row]:
        """Measure one prompt of a whole step, with one adapter."""
        scale = self._bench.scale
        tokens = scale.prompt_tokens
        batch = self._bench.prompts(1, tokens, 0, Mix("one", (16,)))
        name = f"attention, prompt of {tokens}"
        pairs = tokens * (tokens + 1) // 2
        size = self._size(4 * tokens * self._config.num_heads * self._config.head_dim)
        flops = 4 * pairs * self._config.num_heads * self._config.head_dim
        layers = self._layers(tokens * self._config.num_heads * self._config.head_dim)
        rows = self._measure({name: self._attention_of(batch, layers)}, {name: (size, flops)}, layers)
        return rows + self._adapters_of(batch, tokens, f"prompt of {tokens}, rank 16")

    def sampling(self, rows: int) -> list[Row]:
        """Measure the product of a step's last hidden states with the output matrix, and sampling."""
        engine, result = self._bench.engine, []
        most = engine.buckets.max_num_seqs
        hidden = self._normal(0, (most, self._config.hidden_size))
        for mode, temperature in ((SamplingMode.GREEDY, 0.0), (SamplingMode.RANDOM, 0.8)):
            sampling_rows = [SamplingRow(i, 5, i, temperature, 50, 0.9, 0.0, (), False) for i in range(rows)]
            packed, _ = pack_sampling_rows(sampling_rows, most, most)
            packed = jax.device_put(packed, engine.head.sharding)
            program = engine.programs.sample[Sampling(rows, mode, False, False)]
            slots = jnp.zeros(most + 1, jnp.int32)

            def run(program: Any = program, packed: Any = packed) -> jax.Array:
                nonlocal slots
                sampled, slots = program(engine.head, hidden, slots, packed)
                return sampled.tokens

            label = f"head and sampling, {mode.name.lower()}, {rows} rows"
            flops = 2 * rows * self._config.vocab_size * self._config.hidden_size
            result.append(self._row(label, time_calls(run), 1, self._size(engine.head.size), flops))
        return result

    def writes(self) -> list[Row]:
        """Measure writes of all layers, the pool donated as in a step."""
        engine, rng, result = self._bench.engine, np.random.default_rng(0), []
        for count in (self._bench.scale.rows[0], self._bench.scale.rows[-1], self._bench.scale.prompt_tokens):
            k, v = (self._normal(i, (count, self._config.num_kv_heads, self._config.head_dim)) for i in range(2))
            places = rng.permutation((engine.num_pages - 1) * self._bench.layout.page_tokens)[:count]
            ids, slots = (jnp.asarray(a, jnp.int32) for a in np.divmod(places, self._bench.layout.page_tokens))

            def write(pages: list[jax.Array], k: Any, v: Any, ids: Any, slots: Any) -> list[jax.Array]:
                return [write_kv(layer, k, v, ids + 1, slots) for layer in pages]

            program = jax.jit(write, donate_argnums=0).lower(engine.pool, k, v, ids, slots).compile()
            timing = time_calls(functools.partial(engine.through, program, k, v, ids, slots))
            size = self._size(4 * count * self._config.num_kv_heads * self._config.head_dim)
            result.append(self._row(f"write_kv, {count} tokens", timing, self._config.num_layers, size, 0))
        return result

    def _layers(self, elems: int) -> int:
        """Layers of a program with results of `elems` elements each; the pool leaves little memory for them."""
        most = RESULT_BYTES // self._bench.dtype.itemsize // max(1, elems)
        return max(1, min(self._config.num_layers, most))

    def _attention_of(self, batch: Batch, layers: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        engine = self._bench.engine
        packed, program, _, _ = pack_step(batch.chunks, batch.sampling_rows, engine.buckets)
        inputs = engine.buckets.view(packed, program)
        attend = functools.partial(self._attend, tile_tokens=engine.buckets.prefill_tile if program.tiles else 1)
        tables, *places = (jnp.asarray(inputs.tiles[:, i]) for i in (slice(TILE_COLUMNS, None), 0, 1, 2))
        q = self._normal(0, (program.tokens, self._config.num_heads, self._config.head_dim))

        def run(q: jax.Array, pool: list[jax.Array], tables: Any, places: Any) -> jax.Array:
            for layer in pool:
                q = attend(q, layer, tables, *places)  # in place, as in a step
            return q

        return run, (q, engine.pool[:layers], tables, places)

    def _adapters_of(self, batch: Batch, tokens: int, name: str) -> list[Row]:
        """Measure each group of targets; y goes through the layers, updated in place as in a step."""
        engine, layout = self._bench.engine, self._bench.layout
        packed, program, _, _ = pack_step(batch.chunks, batch.sampling_rows, engine.buckets)
        inputs = engine.buckets.view(packed, program)
        plan = inputs.prompt_lora if program.tiles else inputs.decode_lora
        addresses = jax.jit(functools.partial(resolve, layout=layout, tokens=program.tokens))
        plan = jax.device_put(plan, engine.head.sharding)
        targets = addresses(plan)
        placed = {id(s.adapter): s.adapter for s in batch.chunks if s.adapter is not None}
        programs: Programs = {}
        work = {}
        for group in GROUPS:
            shapes = [self._config.target_shape(t) for t in group]
            ranks = [sum(a.placement.ranks.get(t, 0) for a in placed.values()) for t in group]
            if not any(ranks):
                continue
            x, y = self._normal(0, (tokens, shapes[0][0])), self._normal(1, (tokens, sum(d_out for _, d_out in shapes)))

            def run(x: Any, y: Any, pool: list[jax.Array], targets: LoraTargets, group: Any = group) -> jax.Array:
                for layer in pool:
                    y = self._adapt(y, x, layer, targets, group)
                return y

            label = f"{' '.join(t.removesuffix('_proj') for t in group)}, {name}"
            programs[label] = (run, (x, y, engine.pool, targets))
            elems = sum(r * sum(shape) for r, shape in zip(ranks, shapes)) + (x.size + 2 * y.size if program.tiles else 0)
            share = tokens / len(placed)
            work[label] = (self._size(elems), sum(2 * share * r * sum(shape) for r, shape in zip(ranks, shapes)))
        resolved = time_calls(functools.partial(addresses, plan))
        rows = self._measure(programs, work, self._config.num_layers)
        rows.append(self._row(f"addresses, {name}: ms a step", resolved, 1, 2 * 4 * targets.addresses.size, 0))
        return rows

    def _measure(self, programs: Programs, work: dict[str, tuple[float, float]], layers: int) -> list[Row]:
        """Rows of programs that do an op for each layer, compiled side by side; `work` is a layer's bytes and operations."""

        def compiled(name: str) -> Any:
            run, arguments = programs[name]
            return jax.jit(run).lower(*arguments).compile()

        with threads() as pool:
            ready = dict(zip(programs, pool.map(compiled, programs)))
        rows = []
        for name, program in ready.items():
            timing = time_calls(functools.partial(program, *programs[name][1]))
            rows.append(self._row(name, timing, layers, *work[name]))
        return rows

    def _row(self, name: str, timing: Timing, layers: int, num_bytes: float, flops: float) -> Row:
        seconds = timing.seconds / layers
        ceiling = ceilings(self._bench.scale, self._report)
        floor = max(num_bytes / ceiling["copy"], flops / ceiling["matrix"])
        return {
            "op, ms a layer": name,
            "ms": round(seconds * 1e3, 4),
            "floor ms": round(floor * 1e3, 4),
            "% of floor": round(100 * floor / seconds, 1),
            "GB/s": round(num_bytes / seconds / 1e9, 1),
            "TFLOP/s": round(flops / seconds / 1e12, 2),
            "note": "the host's" * timing.host_bound,
        }

    def _size(self, elems: float) -> float:
        return elems * self._bench.dtype.itemsize

    def _normal(self, seed: int, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape, self._bench.dtype)
