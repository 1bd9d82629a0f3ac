"""The device to the executor: weights, pool and compiled programs, behind a few calls that never wait.

No step waits for a program, unless the runner is told to compile programs when steps need them. Once the runner is built, only
a step's small outputs, the pieces of adapters on their way and the norms of DoRA are allocated.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chameleon_jax.models import ops
from chameleon_jax.models.adapters.transfers import PieceSizes, PinnedBlock, measure_link, pinned_memory
from chameleon_jax.models.llama import Llama
from chameleon_jax.models.ops.sampling import Sampled, mask_words
from chameleon_jax.models.page_layout import PageLayout
from chameleon_jax.models.runtime.buckets import Sampling, StepBuckets
from chameleon_jax.models.runtime.compilation import Compilation, Progress
from chameleon_jax.models.runtime.programs import COUNT_TOKENS, Programs
from chameleon_jax.models.runtime.step_inputs import (
    PackedStep,
    SamplingRow,
    SequenceChunk,
    pack_adjustments,
    pack_counts,
    pack_padding,
    pack_sampling_rows,
    pack_step,
)

if TYPE_CHECKING:
    from jaxtyping import Int

PAGES_ROUNDED_TO = 16
"""A pool that takes the memory left has a multiple of this many pages. So it has the same size at the next start, and compiled
programs are found again."""


HOST_POOL_BYTES = 2 << 30
"""Most bytes of a pool on a device that does not know its memory: the host, when it computes."""


class SentStep(NamedTuple):
    """A step, and its inputs on their way to the device.

    Attributes:
        rows: Parameters of the sampling rows.
    """

    step: PackedStep
    inputs: jax.Array
    rows: Sequence[SamplingRow]


class RunningStep(NamedTuple):
    """A step whose forward program was dispatched.

    Attributes:
        rows: Parameters of the sampling rows.
        hidden: Hidden state of each sampling row's token.
        sampling_rows: Packed sampling parameters.
        adjusted: Whether any row's logits change before its token is drawn.
        states: Hidden states of all tokens; None of a program for decoding alone.
        logit_updates: Updates of adapters to the rows' logits; None where the program has none.
    """

    step: PackedStep
    rows: Sequence[SamplingRow]
    hidden: jax.Array
    sampling_rows: jax.Array
    adjusted: bool
    states: jax.Array | None = None
    logit_updates: jax.Array | None = None


class DispatchedStep(NamedTuple):
    """A step that runs, or has run.

    Attributes:
        sampled: Tokens that it draws, one for each sampling row and then padding; None where it draws none.
        done: Ready when the step is.
    """

    sampled: Sampled | None
    done: jax.Array


class ModelRunner:
    """Weights, pool and programs of one model. Calls run in the order in which they are made.

    Args:
        num_pages: Pages of the pool, the trash page included. None takes the memory that weights and scratch leave.
        memory_limit: Bytes of the device that weights, pool and scratch may take together. None where the device does not
            know its memory; the pool then has room for every sequence, and for adapters half as much again.
        backend: Backend of the device ops, one of `ops.BACKENDS`; None is the platform's.
        compiler_options: Options for XLA beside its defaults.
        compile_programs: "ahead" compiles every program here; "background" a few here, and the others in the background; "lazy"
            each when it first runs.

    Attributes:
        link_rate: Bytes a second at which pieces of adapters reach the idle device, measured once.

    Raises:
        ValueError: `memory_limit` leaves no room for a pool.
    """

    def __init__(
        self,
        model: Llama,
        layout: PageLayout,
        buckets: StepBuckets,
        num_pages: int | None,
        dtype: jnp.dtype,
        progress: Progress = lambda done, total: None,
        *,
        memory_limit: int | None = None,
        backend: str | None = None,
        compiler_options: Mapping[str, Any] | None = None,
        compile_programs: str = "ahead",
    ):
        self.layout = layout
        self.buckets = buckets
        self.dtype = dtype
        graph, params = nnx.split(model)
        self._head = model.output_matrix
        device = self._head.devices().pop()
        stats = device.memory_stats() or {}
        self.pieces = PieceSizes.fit(layout.page_bytes(dtype.itemsize), buckets.max_adapter_pages, stats.get("bytes_limit", 0))
        self.programs = Programs(
            graph,
            params,
            self._head,
            layout,
            buckets,
            self.pieces,
            dtype,
            backend or ops.default_backend(),
            compiler_options,
        )
        self.compilation = Compilation(self.programs, layout.config.num_layers)
        self._counts = jnp.zeros((buckets.max_num_seqs + 1, layout.config.vocab_size), jnp.uint16)
        if num_pages is None:
            num_pages = self._pages_on_host() if memory_limit is None else self._pages_that_fit(memory_limit)
        self.num_pages = num_pages
        self.programs.num_pages = self.num_pages
        if compile_programs == "ahead":
            self.compilation.compile_all(progress)
        elif compile_programs == "background":
            self.compilation.compile_first(progress)
        self._pages: list[jax.Array] = []
        self.reset()
        self._memory = self._pages[0].sharding
        self._host_memory = pinned_memory(self._memory)
        self.link_rate = self._measure_link()
        if compile_programs == "ahead" and device.platform != "cpu":
            self.use_every_program()

    def reset(self) -> None:
        """Start from an empty pool, also where an error has left the old one in any state."""
        with contextlib.suppress(Exception):  # the programs that ran on it have ended or failed
            jax.block_until_ready(self._pages)
        for layer in self._pages:
            layer.delete()
        shape = (self.num_pages, self.layout.page_elems)
        self._pages = [jnp.zeros(shape, self.dtype) for _ in range(self.layout.config.num_layers)]
        self._slot_tokens = jnp.zeros(self.buckets.max_num_seqs + 1, jnp.int32)
        self._counts = jnp.zeros_like(self._counts)

    def _pages_on_host(self) -> int:
        sequences = self.buckets.max_num_seqs * self.buckets.table_width
        adapters = max(sequences // 2, self.buckets.max_adapter_pages)
        page_bytes = self.layout.page_bytes(self.dtype.itemsize)
        if 2 * page_bytes > HOST_POOL_BYTES:
            raise ValueError(f"no room for a page pool: {HOST_POOL_BYTES} bytes are left and a page takes {page_bytes}")
        return min(HOST_POOL_BYTES // page_bytes, 1 + sequences + adapters)

    def _pages_that_fit(self, memory_limit: int) -> int:
        jax.block_until_ready(self.programs.weights)
        stats = self._head.devices().pop().memory_stats() or {}
        weights, scratch = stats.get("bytes_in_use", 0), self.programs.scratch_bytes()
        page_bytes = self.layout.page_bytes(self.dtype.itemsize)
        pages = (memory_limit - weights - scratch) // page_bytes // PAGES_ROUNDED_TO * PAGES_ROUNDED_TO
        if pages < 2:
            raise ValueError(
                f"no room for a page pool: of {memory_limit} bytes weights take {weights} and scratch {scratch}, and "
                f"{PAGES_ROUNDED_TO} pages would take {PAGES_ROUNDED_TO * page_bytes}"
            )
        return pages

    def use_every_program(self) -> None:
        """Run each program on padding, which changes nothing that a request reads.

        A GPU loads a program's code and makes its graph at the first use. That takes 5 to 30 ms, which the first requests would
        wait for. On a CPU first uses take longer, and so would all of them at the start.
        """
        config, padding_slot = self.layout.config, self.buckets.max_num_seqs  # as many slots are before it
        for program, forward in self.programs.forward.items():
            inputs = pack_padding(program, self.buckets)
            self._pages = forward(self.programs.weights, self._pages, self._slot_tokens, inputs).pages
        sampling_rows, _ = pack_sampling_rows([], padding_slot, padding_slot)
        hidden = jnp.zeros((padding_slot, config.hidden_size), self.dtype)
        for sampling in self.programs.sample:
            updates = jnp.zeros((sampling.rows, config.vocab_size), jnp.float32) if sampling.adapted else None
            self._sample(sampling, hidden, sampling_rows, [], None, updates)
        for tokens, score in self.programs.score.items():
            states = jnp.zeros((tokens, config.hidden_size), self.dtype)
            score(self._head, states, np.zeros(1 + tokens // self.buckets.prefill_tile + tokens, np.int32))
        for size in self.programs.count:
            self._count(np.full(2 + size, padding_slot, np.int32))
        for size, write in self.programs.write.items():
            if size <= self.num_pages:  # the pool is empty, and stays so
                piece = jnp.zeros((config.num_layers, size, self.layout.page_elems), self.dtype)
                self._pages, _ = write(self._pages, piece, np.arange(size, dtype=np.int32))
        self.block_until_ready()

    def send(self, chunks: Sequence[SequenceChunk], sampling_rows: Mapping[int, SamplingRow]) -> SentStep:
        """Pack a step and start the transfer of its inputs.

        Args:
            chunks: Sequences of the step, those that decode first, then chunks of prompts.
            sampling_rows: `index of a chunk -> parameters of the token behind its last one`, for chunks that sample. The
                step's sampling rows are in this order.
        """
        step = pack_step(chunks, sampling_rows, self.buckets, self.compilation.choose)
        return SentStep(step, jax.device_put(step.packed, self._memory), list(sampling_rows.values()))

    def forward(self, sent: SentStep) -> RunningStep:
        """Dispatch the forward program of a step whose inputs were sent."""
        step, inputs, rows = sent
        forward = self.programs.forward[step.program]
        hidden, sampling_rows, self._pages, states, updates = forward(
            self.programs.weights, self._pages, self._slot_tokens, inputs
        )
        adjusted = any([row.adjustment is not None for row in rows])
        return RunningStep(step, rows, hidden, sampling_rows, adjusted, states, updates)

    def score(self, running: RunningStep, following: Int[np.ndarray, " tokens"]) -> Sampled:
        """Dispatch the program that computes the log-probabilities of prompts' own tokens.

        Args:
            running: Return of `forward` for a step with prompts.
            following: Token behind each token of the step; -1 where none is wanted.

        Returns:
            A row for each token; unspecified where none was wanted.
        """
        tile, most = self.buckets.prefill_tile, self.buckets.most_tokens
        packed = np.zeros(1 + most // tile + most, np.int32)
        wanted = np.unique(np.flatnonzero(following >= 0) // tile)
        packed[0], packed[1 : 1 + len(wanted)] = len(wanted), wanted
        packed[1 + most // tile :][: len(following)] = np.maximum(following, 0)
        scores = self.programs.score[most](self._head, running.states, packed)
        for array in jax.tree.leaves(scores):
            array.copy_to_host_async()
        return scores

    def sample(self, running: RunningStep, masks: Int[np.ndarray, "rows words"] | None = None) -> DispatchedStep:
        """Dispatch the sampling program of a step.

        Args:
            running: Return of `forward`.
            masks: Tokens that each sampling row can draw, as `no_masks` lays them out; None masks none.
        """
        step, rows, hidden, sampling_rows, adjusted, _, updates = running
        if step.mode is None:
            return DispatchedStep(None, hidden)
        num_rows = next(n for n in self.buckets.decode if n >= len(rows)) if updates is None else len(updates)
        wanted = Sampling(num_rows, step.mode, adjusted or updates is not None, updates is not None)
        sampling = self.compilation.choose_sampling(wanted)
        sampled = self._sample(sampling, hidden, sampling_rows, rows, masks, updates)
        return DispatchedStep(sampled, sampled.tokens)

    def _sample(
        self,
        sampling: Sampling,
        hidden: jax.Array,
        sampling_rows: Any,
        rows: Sequence[SamplingRow],
        masks: Int[np.ndarray, "rows words"] | None,
        updates: jax.Array | None,
    ) -> Sampled:
        program = self.programs.sample[sampling]
        if not sampling.adjusted:
            sampled, self._slot_tokens = program(self._head, hidden, self._slot_tokens, sampling_rows)
            return sampled
        adjustments = pack_adjustments(rows, self.no_masks(0) if masks is None else masks, sampling.rows)
        inputs = [jax.device_put(adjustments, self._memory), *([] if updates is None else [updates])]
        state = (self._slot_tokens, self._counts)
        sampled, self._slot_tokens, self._counts = program(self._head, hidden, *state, sampling_rows, *inputs)
        return sampled

    def no_masks(self, rows: int) -> Int[np.ndarray, "rows words"]:
        """Make masks that allow every token: int32, a bit for each token, 32 in a word, the lowest bit first."""
        return np.full((rows, mask_words(self.layout.config.vocab_size)), -1, np.int32)

    def count(self, slot: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Dispatch the count of a slot's tokens, for penalties. Earlier tokens of the slot are forgotten."""
        for packed in pack_counts(slot, prompt, output, self.layout.config.vocab_size, COUNT_TOKENS):
            self._count(packed)

    def _count(self, packed: Int[np.ndarray, " packed"]) -> None:
        self._counts = self.programs.count[COUNT_TOKENS](self._counts, packed)

    def run(self, chunks: Sequence[SequenceChunk], sampling_rows: Mapping[int, SamplingRow]) -> DispatchedStep:
        """`send`, `forward`, then `sample`."""
        return self.sample(self.forward(self.send(chunks, sampling_rows)))

    def stage(self, block: np.ndarray) -> PinnedBlock:
        """Stage a packed adapter `[layers, pages, page_elems]` for `put`. Thread-safe.

        Args:
            block: The array. It must not change afterwards.
        """
        return PinnedBlock.stage(block, self.pieces, self._host_memory)

    def _measure_link(self) -> float:
        """Measure the host's link to the device, in bytes a second; 0 where no adapters are served."""
        if not self.pieces.load_pages:
            return 0.0
        shape = (self.layout.config.num_layers, self.pieces.load_pages, self.layout.page_elems)
        [piece] = self.stage(np.zeros(shape, self.dtype)).pieces
        return measure_link(piece, self._memory, time.perf_counter)

    def put(self, piece: jax.Array | np.ndarray) -> jax.Array:
        """Start the transfer of a staged piece `[layers, n, page_elems]` to the device."""
        return jax.device_put(piece, self._memory)

    def write_adapter(self, piece: jax.Array, pages: Sequence[int]) -> jax.Array:
        """Dispatch the copy of a piece `[layers, n, page_elems]` into its n pages, behind its transfer.

        Args:
            piece: Return of `put`.
            pages: Pages of the pool.

        Returns:
            An array that is ready once the copy was executed and the piece's memory is free.
        """
        self._pages, done = self.programs.write[len(pages)](self._pages, piece, np.array(pages, np.int32))
        return done

    def block_until_ready(self) -> None:
        jax.block_until_ready((self._pages, self._slot_tokens))

    def read_page(self, page: int) -> np.ndarray:
        """`[layers, page_elems]`; for tests."""
        return np.stack([np.asarray(layer[page]) for layer in self._pages])
