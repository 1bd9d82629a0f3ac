"""Programs that stand in for others which are not compiled yet."""

from __future__ import annotations

import dataclasses
import gc
import itertools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.models.adapters.transfers import PieceSizes
from chameleon_jax.models.config import PRESETS, TARGETS
from chameleon_jax.models.llama import abstract_model
from chameleon_jax.models.ops.sampling import SamplingMode
from chameleon_jax.models.page_layout import PageLayout
from chameleon_jax.models.runtime import compilation
from chameleon_jax.models.runtime.buckets import Program, Sampling, StepBuckets, shapes_for
from chameleon_jax.models.runtime.compilation import Compilation
from chameleon_jax.models.runtime.programs import Job, Programs
from tests.properties import examples

CONFIG = dataclasses.replace(PRESETS["tiny"], num_layers=1)
LAYOUT = PageLayout.for_model(CONFIG)
DTYPE = jnp.dtype("float32")
MODEL = abstract_model(CONFIG, DTYPE)
HEAD = jax.ShapeDtypeStruct((CONFIG.vocab_size, CONFIG.hidden_size), DTYPE)


class HeldQueue:
    """Queue whose programs a test compiles itself, in any order."""

    def __init__(self, jobs: list[Job], run: object, threads: int):
        self.left = list(jobs)
        self.wanted: list[Job] = []

    def start(self) -> None: ...

    @property
    def is_empty(self) -> bool:
        return not self.left

    def close(self) -> None: ...

    def want(self, jobs: tuple[Job, ...] | list[Job]) -> None:
        self.wanted += jobs

    def compile(self, index: int) -> None:
        self.left.pop(index).run()


def begin(backend: str, extras: bool, adapters: bool) -> tuple[Compilation, HeldQueue, Programs]:
    """Begin to compile programs in the background, each in no time: none is run."""
    pages = LAYOUT.place({t: 8 for t in TARGETS}).num_pages if adapters else 0
    buckets = StepBuckets(6, 288, 4, 8, pages, extras=extras and adapters, **shapes_for(backend))
    pieces = PieceSizes.fit(LAYOUT.page_bytes(4), pages)
    graph, params = nnx.split(MODEL)
    made = Programs(graph, params, HEAD, LAYOUT, buckets, pieces, DTYPE, "blocked")
    for programs in (made.forward, made.sample, made.write, made.count, made.score):
        programs._compile = lambda key: key
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "CompileQueue", HeldQueue)
        compiled = Compilation(made, 1)
        compiled.compile_first()
    assert isinstance(compiled._queue, HeldQueue)
    return compiled, compiled._queue, made


def check(compiled: Compilation, made: Programs) -> None:
    """Check that every step that buckets allow has programs, and the smallest that can run it."""
    buckets = made.buckets
    for own in buckets.programs:
        chosen = compiled.choose(own)
        assert chosen in made.forward and chosen.can_run(own)
        updated = Sampling(buckets.sampled_rows(chosen), SamplingMode.LOGPROBS, True, True)
        assert not chosen.extras or updated in made.sample
        better = [p for p in made.forward if p.can_run(own) and p < chosen]
        assert all(not can_sample(made, p) for p in better)
        most = min(buckets.max_num_seqs, own.rows + own.tiles)
        counts = [buckets.sampled_rows(chosen)] if chosen.extras else [n for n in buckets.decode if n <= most]
        for rows, mode, adjusted in itertools.product(counts, SamplingMode, (False, True)):
            wanted = Sampling(rows, mode, adjusted or chosen.extras, chosen.extras)
            sampling = compiled.choose_sampling(wanted)
            assert sampling in made.sample and sampling.adapted == chosen.extras
            assert sampling.rows == rows if chosen.extras else sampling.rows >= rows
            assert sampling.mode >= mode and sampling.adjusted >= wanted.adjusted
            if wanted in made.sample:
                assert sampling == wanted


def can_sample(made: Programs, program: Program) -> bool:
    """Tell whether programs sample whatever the rows of a step need."""
    buckets = made.buckets
    rows = buckets.sampled_rows(program)
    kinds = [False, True] if program.extras else [False]
    return all(Sampling(rows, SamplingMode.LOGPROBS, True, kind) in made.sample for kind in kinds)


@pytest.mark.parametrize(
    ("backend", "extras", "adapters"), [("blocked", 0, 1), ("triton", 0, 1), ("triton", 1, 1), ("blocked", 0, 0)]
)
@examples(10)
@given(order=st.randoms(use_true_random=False))
def test_every_step_has_programs_in_whatever_order_they_come(backend, extras, adapters, order):
    compiled, queue, made = begin(backend, bool(extras), bool(adapters))
    check(compiled, made)
    for _ in range(8):
        for _ in range(order.randrange(len(queue.left) // 3 + 1)):
            queue.compile(order.randrange(len(queue.left)))
        check(compiled, made)
    while not queue.is_empty:
        queue.compile(0)
    check(compiled, made)
    assert not compiled.runs_beside and made.num_compiled == made.num_programs
    queue.wanted.clear()
    check(compiled, made)
    assert not queue.wanted  # each step runs its own programs


def test_few_programs_are_compiled_first_and_a_step_wants_its_own():
    compiled, queue, made = begin("blocked", False, True)
    assert set(made.forward) == {Program(296, 6, 20, 7), Program(6, 6, 0, 7)}
    assert set(made.sample) == {Sampling(6, SamplingMode.LOGPROBS, True, False)}
    assert compiled.choose(Program(2, 2, 0, 0)) == Program(6, 6, 0, 7)
    assert [job.key for job in queue.wanted] == [Sampling(2, SamplingMode.LOGPROBS, True, False), Program(2, 2, 0, 0)]
    assert [job.key for job in queue.left[:2]] == [Sampling(1, SamplingMode.LOGPROBS, True, False), Program(1, 1, 0, 0)]


def test_without_a_background_a_step_runs_its_own_programs():
    _, _, made = begin("blocked", False, True)
    lazy = Compilation(made, 1)
    assert lazy.choose(Program(1, 1, 0, 0)) == Program(1, 1, 0, 0) and not lazy.runs_beside
    assert lazy.choose(Program(3, 3, 0, 0)) == Program(4, 4, 0, 0)
    assert lazy.choose_sampling(Sampling(1, SamplingMode.GREEDY, False, False)).rows == 1


def test_threads_end_with_the_engine(monkeypatch):
    _, _, made = begin("blocked", False, True)
    closed = []
    monkeypatch.setattr(compilation.CompileQueue, "close", lambda queue: closed.append(queue))
    for programs in (made.forward, made.sample):
        programs.clear()
    compiled = Compilation(made, 1)
    compiled.compile_first()
    assert not closed
    del compiled
    gc.collect()
    assert len(closed) == 1


def test_a_job_is_short_in_a_log():
    _, _, made = begin("blocked", False, True)
    assert "Program(tokens=1, rows=1, tiles=0, adapted=0)" in str(Job(made.forward, Program(1, 1, 0, 0)))
    assert len(str(Job(made.forward, Program(1, 1, 0, 0)))) < 200
