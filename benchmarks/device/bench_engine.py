"""Engine to measure, with random weights, a pool full of random numbers, and programs that are compiled on demand."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.device.compilation import threads
from chameleon_jax.models.config import LlamaConfig
from chameleon_jax.models.llama import Llama, abstract_model
from chameleon_jax.models.runtime.buckets import Sampling, StepBuckets
from chameleon_jax.models.runtime.model_runner import ModelRunner
from chameleon_jax.models.runtime.programs import Programs
from chameleon_jax.models.runtime.step_inputs import SamplingRow, SequenceChunk, pack_step

SCALE_OF_ROWS = 0.02
"""Standard deviation of the numbers in the pool, KV and LoRA rows; adapters then change a layer's output by as much as the
output itself."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """A step that can be run again and again.

    Attributes:
        floor_bytes: Bytes that the step must read: the weights but for the embedding, each row's KV, each adapter's rows.
        note: Difference to the batch that was asked for, empty if there is none.
    """

    chunks: list[SequenceChunk]
    sampling_rows: dict[int, SamplingRow]
    floor_bytes: float
    note: str


class BenchEngine(ModelRunner):
    """`ModelRunner` with programs that are compiled when they are used, and with access to its pool and steps."""

    def prepare(self, batches: Iterable[Batch]) -> tuple[int, float]:
        """Compile the forward programs of some steps side by side, and return their number and the seconds."""
        begin = time.perf_counter()
        keys = dict.fromkeys(pack_step(batch.chunks, batch.sampling_rows, self.buckets).program for batch in batches)
        with threads() as pool:
            list(pool.map(self.programs.forward.__getitem__, keys))
        return len(keys), time.perf_counter() - begin

    def compile(self, batch: Batch, buckets: StepBuckets | None = None, programs: Programs | None = None) -> None:
        """Compile a step's forward program, among other `programs` if any. Thread-safe for different programs."""
        program = pack_step(batch.chunks, batch.sampling_rows, buckets or self.buckets).program
        (programs or self.programs).forward[program]

    def fill(self, seed: int = 0) -> None:
        """Fill all pages with random numbers; pages that are far from one another are copies."""
        shape, dtype = self._pages[0].shape, self.dtype
        few = min(shape[0], 61)

        @jax.jit
        def draw(key: jax.Array) -> jax.Array:
            some = jax.random.normal(key, (few, shape[1]), dtype) * SCALE_OF_ROWS
            return some[jnp.arange(shape[0]) % few]

        for i, key in enumerate(jax.random.split(jax.random.key(seed), len(self._pages))):
            self._pages[i].delete()  # there is no room for two
            self._pages[i] = draw(key)
        vocab = self.layout.config.vocab_size
        self._slot_tokens = jax.random.randint(jax.random.key(seed), self._slot_tokens.shape, 0, vocab, jnp.int32)
        self.block_until_ready()

    def packed(self, batch: Batch) -> Callable[[], jax.Array]:
        """Return a dispatch of the step with arguments already on the device, which takes the device's time alone."""
        packed, program, _, mode = pack_step(batch.chunks, batch.sampling_rows, self.buckets)
        if mode is None:
            raise ValueError("a step to measure draws tokens")
        rows = next(n for n in self.buckets.decode if n >= len(batch.sampling_rows))
        forward, sample = self.programs.forward[program], self.programs.sample[Sampling(rows, mode, False, False)]
        inputs = jax.device_put(packed, self._memory)

        def step() -> jax.Array:
            found = forward(self.programs.weights, self._pages, self._slot_tokens, inputs)
            self._pages = found.pages
            sampled, self._slot_tokens = sample(self._head, found.hidden, self._slot_tokens, found.sampling_rows)
            return sampled.tokens

        return step

    def through(self, program: Callable[..., list[jax.Array]], *arguments: Any) -> jax.Array:
        """Run a program that takes the pool, donated, and returns it."""
        self._pages = program(self._pages, *arguments)
        return self._pages[-1]

    @property
    def pool(self) -> list[jax.Array]:
        """Pool, one array a layer; ask again after a step, which replaces it."""
        return self._pages

    @property
    def head(self) -> jax.Array:
        return self._head

    @property
    def ready(self) -> bool:
        """Whether the pool is there; a step that failed has taken it along."""
        return not any(layer.is_deleted() for layer in self._pages)


def random_weights(config: LlamaConfig, dtype: jnp.dtype, seed: int = 0) -> Llama:
    """Random model as `llama.random_model` makes it, with a small program for each shape instead of a large one for all."""
    graph, shapes = nnx.split(abstract_model(config, dtype))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    @jax.jit(static_argnums=1)
    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.ones(shape, dtype) if len(shape) == 1 else jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5

    return nnx.merge(graph, jax.tree.unflatten(tree, [draw(key, leaf.shape) for key, leaf in zip(keys, leaves)]))
