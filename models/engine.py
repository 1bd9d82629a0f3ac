"""The device as the executor sees it: weights, pool and compiled programs, behind three calls that never wait.

Everything is compiled when the engine is built; afterwards nothing is, and nothing is allocated but a step's small outputs.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chameleon_jax.models import steps
from chameleon_jax.models.llama import Llama
from chameleon_jax.models.page_layout import TRASH_PAGE, PageLayout
from chameleon_jax.models.sampling import Sampled, SamplingMode
from chameleon_jax.models.step_inputs import Draw, Segment, pack_draws, pack_step
from chameleon_jax.models.steps import DECODE_TILE, PREFILL_TILE, StepBuckets

LOAD_BYTES = 16 << 20
"""An adapter is brought in by pieces of about that many bytes, so that a step waits for one piece at most."""

Progress = Callable[[int, int], None]
"""`(programs compiled, programs in all)`."""


class DeviceEngine:
    """See the module. Calls are executed in the order in which they are made.

    Args:
        num_pages: pages of the pool, the trash page included.
    """

    def __init__(
        self,
        model: Llama,
        layout: PageLayout,
        buckets: StepBuckets,
        num_pages: int,
        dtype: jnp.dtype,
        progress: Progress = lambda done, total: None,
    ):
        self.layout = layout
        self.buckets = buckets
        self.dtype = dtype
        self._graph, self._params = nnx.split(model)
        self._pages = [jnp.zeros((num_pages, layout.page_elems), dtype) for _ in range(layout.config.num_layers)]
        self._slot_tokens = jnp.zeros(buckets.max_num_seqs + 1, jnp.int32)
        self.load_pages = max(1, min(LOAD_BYTES // layout.page_bytes(dtype.itemsize), max(1, buckets.max_adapter_pages)))
        self._forward: dict[tuple[int, int, bool], Any] = {}
        self._sample: dict[tuple[int, SamplingMode], Any] = {}
        self._write: Any = None
        self._compile(progress)

    def run(self, segments: Sequence[Segment], draws: dict[int, Draw]) -> tuple[Sampled, list[int]] | None:
        """Dispatches one step. `draws` says for which segments (by index) a token is drawn behind their last one.

        Returns:
            What is drawn, and for each segment the row of it that is the segment's; None where nothing is.
        """
        inputs, last = pack_step(segments, self.buckets)
        tiles = inputs.tiles.shape[0]
        tile_tokens = inputs.tokens.shape[0] // tiles
        forward = self._forward[tiles, tile_tokens, inputs.lora is not None]
        hidden, self._pages = forward(self._params, self._pages, self._slot_tokens, inputs)
        if not draws:
            return None
        rows, mode = pack_draws({last[i]: draw for i, draw in draws.items()}, tiles, self.buckets.max_num_seqs)
        sampled, self._slot_tokens = self._sample[tiles, mode](self._params, hidden, self._slot_tokens, rows)
        return sampled, last

    def put(self, piece: np.ndarray) -> jax.Array:
        """Starts the transfer of `[layers, load_pages, page_elems]` to the device; the caller never writes to it again."""
        return jax.device_put(piece)

    def write_adapter(self, piece: jax.Array, pages: Sequence[int]) -> None:
        """Dispatches the copy of a transferred piece into its pages; places beyond `pages` go to the trash page."""
        ids = np.full(self.load_pages, TRASH_PAGE, np.int32)
        ids[: len(pages)] = pages
        self._pages = self._write(self._pages, piece, ids)

    def block_until_ready(self) -> None:
        jax.block_until_ready((self._pages, self._slot_tokens))

    def read_page(self, page: int) -> np.ndarray:
        """`[layers, page_elems]`; for tests."""
        return np.stack([np.asarray(layer[page]) for layer in self._pages])

    def _compile(self, progress: Progress) -> None:
        """Compiles every program on a few threads (XLA releases the GIL)."""
        lora = (False, True) if self.buckets.max_adapter_pages else (False,)
        jobs: list[Callable[[], None]] = []
        for tile_tokens in (PREFILL_TILE, DECODE_TILE):
            for tiles in reversed(self.buckets.sizes(tile_tokens)):
                jobs += [functools.partial(self._compile_forward, tiles, tile_tokens, with_lora) for with_lora in lora]
        jobs += [
            functools.partial(self._compile_sample, rows, mode) for rows in self.buckets.sample_rows for mode in SamplingMode
        ]
        if self.buckets.max_adapter_pages:
            jobs.append(self._compile_write)
        lock, done = threading.Lock(), 0

        def run(job: Callable[[], None]) -> None:
            nonlocal done
            job()
            with lock:
                done += 1
                progress(done, len(jobs))

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            list(threads.map(run, jobs))

    def _compile_forward(self, tiles: int, tile_tokens: int, lora: bool) -> None:
        fn = functools.partial(steps.forward, self._graph, layout=self.layout)
        inputs = self.buckets.example(tiles, tile_tokens, lora)
        lowered = jax.jit(fn, donate_argnums=1).lower(self._params, self._pages, self._slot_tokens, inputs)
        self._forward[tiles, tile_tokens, lora] = lowered.compile()

    def _compile_sample(self, rows: int, mode: SamplingMode) -> None:
        fn = functools.partial(steps.sample_step, self._graph, mode=mode)
        hidden = jax.ShapeDtypeStruct((rows, self.layout.config.hidden_size), self.dtype)
        packed, _ = pack_draws({}, rows, self.buckets.max_num_seqs)
        lowered = jax.jit(fn, donate_argnums=2).lower(self._params, hidden, self._slot_tokens, packed)
        self._sample[rows, mode] = lowered.compile()

    def _compile_write(self) -> None:
        shape = (self.layout.config.num_layers, self.load_pages, self.layout.page_elems)
        piece = jax.ShapeDtypeStruct(shape, self.dtype)
        ids = jax.ShapeDtypeStruct((self.load_pages,), jnp.int32)
        self._write = jax.jit(steps.write_adapter, donate_argnums=0).lower(self._pages, piece, ids).compile()
