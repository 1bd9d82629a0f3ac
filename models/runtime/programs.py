"""Programs of an engine, how each is compiled, and the memory they need beside the pool."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from chameleon_jax.models.adapters.against_base import norm_bytes
from chameleon_jax.models.adapters.transfers import PieceSizes
from chameleon_jax.models.ops.sampling import ADJUSTMENT_COLUMNS, SAMPLING_COLUMNS, SamplingMode, count_tokens, mask_words
from chameleon_jax.models.page_layout import PageLayout
from chameleon_jax.models.runtime import steps
from chameleon_jax.models.runtime.buckets import Program, Sampling, StepBuckets
from chameleon_jax.models.runtime.compile_threads import on_threads

COUNT_TOKENS = 1024
"""Tokens that one run of the counting program takes."""
STEPS_IN_FLIGHT = 2
"""Steps that the device holds at a time: the host dispatches one while the device computes the one before."""


class ProgramCache(dict[Any, Any]):
    """Programs of one kind by key. A program that is missing is compiled."""

    __eq__, __hash__ = object.__eq__, object.__hash__  # type: ignore[assignment]  # programs are equal where they are the same

    __repr__ = object.__repr__  # not every program

    def __init__(self, compile_key: Callable[[Any], Any]):
        super().__init__()
        self._compile = compile_key

    def __missing__(self, key: Any) -> Any:
        self[key] = compiled = self._compile(key)
        return compiled


class Job(NamedTuple):
    """Program to compile: its kind, and its key there."""

    programs: ProgramCache
    key: Any

    def run(self) -> None:
        """Compile it, unless it is compiled."""
        self.programs[self.key]


class Programs:
    """Programs for a pool of `num_pages`, each compiled once: when `Compilation` says so, else at its first use.

    Args:
        graph: Structure of the model, from `nnx.split`.
        params: Weights of the model, from `nnx.split`.
        head: Its output matrix.
        backend: Backend of the device ops, one of `ops.BACKENDS`.
        compiler_options: Options for XLA beside its defaults.

    Attributes:
        buckets: Shapes of the programs.
        num_pages: Pages of the pool. Set it before the first program is compiled.
        weights: Weights as `forward` takes them: a flat list. To take the model's tree apart at every dispatch would cost the
            host several times the rest of a dispatch.
        forward: `Program -> steps.forward`.
        sample: `Sampling -> steps.sample_step`, or `steps.sample_adjusted_step` where adjusted is true, with `logit_updates`
            where adapted is true too.
        write: `pages of a piece -> steps.write_adapter`.
        count: `tokens -> sampling.count_tokens`, of COUNT_TOKENS tokens.
        score: `tokens -> steps.score_prompts`, of the largest step.
    """

    def __init__(
        self,
        graph: Any,
        params: Any,
        head: jax.Array,
        layout: PageLayout,
        buckets: StepBuckets,
        pieces: PieceSizes,
        dtype: jnp.dtype,
        backend: str,
        compiler_options: Mapping[str, Any] | None = None,
    ):
        self.num_pages = 0
        self.forward = ProgramCache(lambda program: self._compile_forward(self.num_pages, program))
        self.sample = ProgramCache(self._compile_sample)
        self.write = ProgramCache(lambda size: self._compile_write(self.num_pages, size))
        self.count = ProgramCache(self._compile_count)
        self.score = ProgramCache(self._compile_score)
        self._graph, self._head = graph, head
        self.weights, self._tree = jax.tree.flatten(params)
        self._layout, self.buckets, self._pieces, self._dtype = layout, buckets, pieces, dtype
        self._backend = backend
        self._options = dict(compiler_options or {})
        self._slot_tokens = jax.ShapeDtypeStruct((buckets.max_num_seqs + 1,), jnp.int32)
        self._counts = jax.ShapeDtypeStruct((buckets.max_num_seqs + 1, layout.config.vocab_size), jnp.uint16)

    @property
    def num_compiled(self) -> int:
        """Number of programs compiled so far."""
        return sum(map(len, (self.forward, self.sample, self.write, self.count, self.score)))

    @functools.cached_property
    def num_programs(self) -> int:
        """Number of programs that there can be."""
        return len(self.listing())

    def listing(self) -> list[Job]:
        """Every program, the slowest to compile first."""
        buckets = self.buckets
        forwards = [Job(self.forward, program) for program in reversed(buckets.programs)]
        kinds = itertools.product(reversed(buckets.decode), reversed(SamplingMode), self._sampling_kinds())
        samples = [Job(self.sample, Sampling(rows, mode, *kind)) for rows, mode, kind in kinds]
        return [*forwards, *samples, *self.others()]

    def others(self) -> list[Job]:
        """List the programs that no other can stand in for."""
        writes = [Job(self.write, size) for size in self._pieces.all]
        return [*writes, Job(self.count, COUNT_TOKENS), Job(self.score, self.buckets.most_tokens)]

    def _sampling_kinds(self) -> list[tuple[bool, bool]]:
        """List the values of `adjusted` and `adapted` that sampling programs have."""
        plain = [(True, False), (False, False)]
        return [(True, True), *plain] if self.buckets.extras else plain

    def scratch_bytes(self) -> int:
        """Measure the memory that running takes besides weights and pool, in bytes.

        It is the largest step's temporaries and results, once for each step in flight, the adapters on their way, and with
        extras the norms of one that is read. The programs measured are compiled for a pool of two pages: none copies the pool,
        so its size does not matter.
        """
        buckets = self.buckets
        # of each kind; a program without adapters may take more, as XLA keeps more at a time
        largest = {(program.rows > 0, program.tiles > 0, program.adapted): program for program in buckets.programs}
        forwards = [functools.partial(self._compile_forward, 2, program) for program in largest.values()]
        samples = [
            functools.partial(self._compile_sample, Sampling(buckets.max_num_seqs, mode, *kind))
            for mode in SamplingMode
            for kind in self._sampling_kinds()
        ]
        samples.append(functools.partial(self._compile_score, buckets.most_tokens))
        needs = on_threads(lambda compile_it: _needs(compile_it()), [*forwards, *samples])
        largest = max(needs[: len(forwards)]) + max(needs[len(forwards) :])
        norms = norm_bytes(self._layout.config, buckets.max_rank) if buckets.extras else 0
        return STEPS_IN_FLIGHT * largest + self._pieces.device_bytes + norms

    def _pool(self, num_pages: int) -> list[jax.ShapeDtypeStruct]:
        shape = (num_pages, self._layout.page_elems)
        return [jax.ShapeDtypeStruct(shape, self._dtype)] * self._layout.config.num_layers

    def _compile_forward(self, num_pages: int, program: Program) -> Any:
        def fn(weights: list[jax.Array], *rest: Any) -> Any:
            params = jax.tree.unflatten(self._tree, weights)
            options: dict[str, Any] = {"buckets": self.buckets, "layout": self._layout, "backend": self._backend}
            return steps.forward(self._graph, params, *rest, program=program, **options)

        packed = jax.ShapeDtypeStruct((self.buckets.packed_size(program),), jnp.int32)
        return self._compile(fn, self.weights, self._pool(num_pages), self._slot_tokens, packed, donated=1)

    def _compile_sample(self, sampling: Sampling) -> Any:
        rows, mode, adjusted, adapted = sampling
        config, slots = self._layout.config, self.buckets.max_num_seqs
        hidden = jax.ShapeDtypeStruct((slots, config.hidden_size), self._dtype)
        sampling_rows = jax.ShapeDtypeStruct((slots, SAMPLING_COLUMNS), jnp.int32)
        options: dict[str, Any] = {"mode": mode, "backend": self._backend}
        state = [self._head, hidden, self._slot_tokens]
        if not adjusted:
            return self._compile(functools.partial(steps.sample_step, rows=rows, **options), *state, sampling_rows, donated=2)
        adjustments = jax.ShapeDtypeStruct((rows, ADJUSTMENT_COLUMNS + mask_words(config.vocab_size)), jnp.int32)
        fn = functools.partial(steps.sample_adjusted_step, **options)
        updates = [jax.ShapeDtypeStruct((rows, config.vocab_size), jnp.float32)] if adapted else []
        return self._compile(fn, *state, self._counts, sampling_rows, adjustments, *updates, donated=(2, 3))

    def _compile_write(self, num_pages: int, size: int) -> Any:
        piece = jax.ShapeDtypeStruct((self._layout.config.num_layers, size, self._layout.page_elems), self._dtype)
        ids = jax.ShapeDtypeStruct((size,), jnp.int32)
        fn = functools.partial(steps.write_adapter, backend=self._backend)
        return self._compile(fn, self._pool(num_pages), piece, ids, donated=0)

    def _compile_count(self, tokens: int) -> Any:
        return self._compile(count_tokens, self._counts, jax.ShapeDtypeStruct((2 + tokens,), jnp.int32), donated=0)

    def _compile_score(self, tokens: int) -> Any:
        tile = self.buckets.prefill_tile
        states = jax.ShapeDtypeStruct((tokens, self._layout.config.hidden_size), self._dtype)
        packed = jax.ShapeDtypeStruct((1 + tokens // tile + tokens,), jnp.int32)
        return self._compile(functools.partial(steps.score_prompts, tile=tile), self._head, states, packed, donated=())

    def _compile(self, fn: Callable[..., Any], *arguments: Any, donated: int | tuple[int, ...]) -> Any:
        return jax.jit(fn, donate_argnums=donated).lower(*arguments).compile(self._options)


def _needs(compiled: Any) -> int:
    """Bytes of a program's temporaries, and of its results outside its arguments' memory."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
