"""Engine that a group of sections shares, and steps for it."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.device.bench_engine import Batch, BenchEngine, random_weights
from benchmarks.device.report import Skip
from benchmarks.device.scale import ChosenBuckets, Mix, Scale
from chameleon_jax.models import ops
from chameleon_jax.models.config import TARGETS, LlamaConfig
from chameleon_jax.models.llama import Llama
from chameleon_jax.models.page_layout import PageLayout, PlacedAdapter
from chameleon_jax.models.runtime.buckets import shapes_for
from chameleon_jax.models.runtime.programs import Programs
from chameleon_jax.models.runtime.step_inputs import SamplingRow, SequenceChunk


class Workbench:
    """Engine of a group of sections, and batches for it.

    Args:
        config: The model. None takes the scale's.
        pool_bytes: Largest size of the pool. None takes the scale's.
    """

    def __init__(self, scale: Scale, config: LlamaConfig | None = None, pool_bytes: int | None = None):
        self.scale = scale
        self.config = config or scale.config
        self.layout = PageLayout.for_model(self.config)
        self.dtype = jnp.dtype(scale.dtype)
        self._pool_bytes = pool_bytes or scale.pool_bytes
        self._model: Llama | None = None
        self._engine: BenchEngine | None = None

    @property
    def model(self) -> Llama:
        if self._model is None:
            self._model = jax.block_until_ready(random_weights(self.config, self.dtype))
        return self._model

    @property
    def engine(self) -> BenchEngine:
        """Engine, built when it is first asked for, and anew after a failed step has taken its pool."""
        if self._engine is None or not self._engine.ready:
            self._engine = None
            gc.collect()
            model = self.model
            self._engine = BenchEngine(model, self.layout, self.buckets(), self.num_pages, self.dtype, compile_programs="lazy")
            self._engine.fill()
        return self._engine

    def buckets(self, max_tokens: int | None = None) -> ChosenBuckets:
        """Buckets for sequences of up to `max_tokens`, or up to the scale's."""
        scale = self.scale
        rows, tokens = scale.mixed
        return ChosenBuckets(
            max_num_seqs=max(scale.rows),
            max_prefill_tokens=scale.prompt_tokens,
            table_width=self.layout.pages_for_tokens(max_tokens or scale.max_tokens),
            max_rank=scale.max_rank,
            max_adapter_pages=self.layout.place(dict.fromkeys(TARGETS, max(scale.load_ranks))).num_pages,
            **shapes_for("triton") | {"prefill_tile": scale.prefill_tile},  # also without a GPU
            rows=scale.rows,
            steps=(tokens, rows + tokens, scale.prompt_tokens, scale.prompt_tokens + max(scale.rows)),  # others are padded
        )

    def programs(self, buckets: ChosenBuckets, options: Mapping[str, Any] | None = None) -> Programs:
        """Programs for other shapes than the engine's, or with other XLA options, compiled when they are used."""
        engine = self.engine
        graph, params = nnx.split(self.model)
        made = Programs(
            graph, params, engine.head, self.layout, buckets, engine.pieces, self.dtype, ops.default_backend(), options
        )
        made.num_pages = engine.num_pages
        return made

    @contextlib.contextmanager
    def using(self, buckets: ChosenBuckets, programs: Programs) -> Iterator[BenchEngine]:
        """Let the engine use `programs` that were made for `buckets`."""
        engine = self.engine
        before = engine.buckets, engine.programs
        engine.buckets, engine.programs = buckets, programs
        try:
            yield engine
        finally:
            engine.buckets, engine.programs = before

    @functools.cached_property
    def num_pages(self) -> int:
        """Pages of every engine that is built here, as programs are compiled for them."""
        page_bytes = self.layout.page_bytes(self.dtype.itemsize)
        stats = jax.devices()[0].memory_stats()
        room = self._pool_bytes
        if stats is not None and "bytes_limit" in stats:
            left = stats["bytes_limit"] - stats["bytes_in_use"] - self.scale.scratch_bytes
            room = left if room is None else min(left, room)
        assert room is not None
        return room // page_bytes

    # -- batches --------------------------------------------------------------------------------------------------------

    def decode(self, rows: int, context: int, mix: Mix, seed: int = 0) -> Batch:
        """Step of `rows` sequences of `context` tokens, the computed one included.

        Raises:
            Skip: The step does not fit the pool.
        """
        deal = self._deal(seed)
        width = self.layout.pages_for_tokens(context)
        capacity = self.engine.num_pages - 1
        if rows * width > capacity:
            raise Skip(f"KV takes {rows * width} pages; the pool has {capacity}")
        tables = [tuple(itertools.islice(deal, width)) for _ in range(rows)]
        adapters = self.adapters(mix, rows, deal, capacity - rows * width)
        if mix.ranks and not adapters:
            raise Skip("no adapter fits beside the KV")
        owners = [adapters[i % len(adapters)] if adapters else None for i in range(rows)]
        chunks = [SequenceChunk(None, context - 1, i, tables[i], owner) for i, owner in enumerate(owners)]
        sampling_rows = {i: SamplingRow(i, context, i, 0.0, 0, 1.0, 0.0, (), False) for i in range(rows)}
        note = f"{len(adapters)} adapters" if mix.ranks and len(adapters) < rows else ""
        return Batch(
            chunks, sampling_rows, self.weight_bytes + rows * context * self.token_bytes + self.adapter_bytes(adapters), note
        )

    def prompts(self, count: int, tokens: int, start: int, mix: Mix, seed: int = 0, beside: Batch | None = None) -> Batch:
        """Step that computes `tokens` tokens of each of `count` prompts from position `start` on.

        Its sequences have other slots and pages than the sequences of the batch `beside`.

        Raises:
            Skip: The step does not fit the pool.
        """
        others = beside.chunks if beside else []
        taken = {page for chunk in others for page in (*chunk.pages, *(chunk.adapter.pages if chunk.adapter else ()))}
        deal = (page for page in self._deal(seed) if page not in taken)
        width = self.layout.pages_for_tokens(start + tokens)
        capacity = self.engine.num_pages - 1 - len(taken)
        if count * width > capacity:
            raise Skip(f"KV takes {count * width} pages; the pool has {capacity}")
        tables = [tuple(itertools.islice(deal, width)) for _ in range(count)]
        adapters = self.adapters(mix, count, deal, capacity - count * width)
        if mix.ranks and len(adapters) < count:
            raise Skip("the adapters do not fit beside the KV")
        words = np.random.default_rng(seed).integers(0, self.config.vocab_size, (count, tokens)).tolist()
        slots = [len(others) + i for i in range(count)]
        owners = adapters or itertools.repeat(None)
        chunks = [SequenceChunk(*of_one) for of_one in zip(words, itertools.repeat(start), slots, tables, owners)]
        sampling_rows = {i: SamplingRow(slot, start + tokens, i, 0.0, 0, 1.0, 0.0, (), False) for i, slot in enumerate(slots)}
        return Batch(chunks, sampling_rows, self.weight_bytes + self.adapter_bytes(adapters), "")

    def joined(self, decode: Batch, prompts: Batch) -> Batch:
        """Step that does the work of two, whose slots and pages differ."""
        behind = {len(decode.chunks) + i: row for i, row in prompts.sampling_rows.items()}
        floor_bytes = decode.floor_bytes + prompts.floor_bytes - self.weight_bytes
        return Batch(decode.chunks + prompts.chunks, decode.sampling_rows | behind, floor_bytes, decode.note)

    def adapters(self, mix: Mix, count: int, deal: Iterator[int], room: int) -> list[PlacedAdapter]:
        """Up to `count` adapters, as many as `room` pages hold."""
        placed: list[PlacedAdapter] = []
        for rank in itertools.islice(itertools.cycle(mix.ranks), count if mix.ranks else 0):
            placement = self.layout.place(dict.fromkeys(mix.targets, rank))
            room -= placement.num_pages
            if room < 0:
                break
            placed.append(PlacedAdapter(placement, tuple(itertools.islice(deal, placement.num_pages))))
        return placed

    def _deal(self, seed: int) -> Iterator[int]:
        """Pages in random order, the trash page excepted."""
        return iter((1 + np.random.default_rng(seed).permutation(self.engine.num_pages - 1)).tolist())

    @property
    def weight_bytes(self) -> int:
        embedding = 0 if self.config.tie_word_embeddings else self.config.vocab_size * self.config.hidden_size
        return (self.config.num_params - embedding) * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        return 2 * self.config.num_kv_heads * self.config.head_dim * self.config.num_layers * self.dtype.itemsize

    def adapter_bytes(self, adapters: Sequence[PlacedAdapter]) -> int:
        """Bytes of true rank rows, once for each adapter, however many rows of the batch use it."""
        elems = sum(r * sum(self.config.target_shape(t)) for a in adapters for t, r in a.placement.ranks.items())
        return elems * self.config.num_layers * self.dtype.itemsize

    def run(self, batch: Batch) -> Callable[[], Any]:
        """Return a run of the whole step as serving does it."""
        engine = self.engine

        def step() -> Any:
            return engine.run(batch.chunks, batch.sampling_rows).done

        return step


@functools.cache
def shared(scale: Scale) -> Workbench:
    """Workbench of all sections in this process, so that weights are drawn and a pool is filled once."""
    return Workbench(scale)
