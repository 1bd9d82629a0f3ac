"""When an engine's programs are compiled, and which of them a step runs meanwhile."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from chameleon_jax.models.ops.sampling import SamplingMode
from chameleon_jax.models.runtime.buckets import Program, Sampling
from chameleon_jax.models.runtime.compile_threads import CompileQueue, num_threads, on_threads
from chameleon_jax.models.runtime.programs import Job, Programs

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""`(programs compiled, programs in all)`."""

FORWARD_S, LAYER_S, ADAPTED_S, OTHER_S = 0.5, 0.2, 0.15, 0.4
"""Processor's seconds to compile a forward program without layers, one kind of tokens in a layer, the adapters of these tokens,
and a sampling or writing program. Measured on a CPU with models of 2 and 30 layers."""


class Compilation:
    """Compilation of an engine's programs.

    All of them are compiled before the first request (`compile_all`); or a few large ones, and the others in the background,
    while steps run those that are there (`compile_first`, `start`); or, without a call of either, each at its first use.

    Args:
        programs: The programs.
        num_layers: Layers of the model.
    """

    def __init__(self, programs: Programs, num_layers: int):
        self._programs, self._num_layers = programs, num_layers
        self._queue: CompileQueue[Job] | None = None

    @property
    def runs_beside(self) -> bool:
        """Whether programs are compiled in the background now."""
        return self._queue is not None and not self._queue.is_empty

    def compile_all(self, progress: Progress = lambda done, total: None) -> None:
        """Compile every program, on a few threads (XLA releases the GIL)."""
        self._compile_now(self._programs.listing(), progress)

    def compile_first(self, progress: Progress = lambda done, total: None) -> None:
        """Compile a program of each kind that can stand in for the others. `start` begins to compile the others.

        The smallest are compiled first, unless steps want others: `choose` and `choose_sampling` tell which are wanted.
        """
        buckets, listing = self._programs.buckets, self._programs.listing()
        most = [program for program in buckets.programs if program.adapted == buckets.programs[-1].adapted]
        decodes, mixed = ([p for p in most if p.rows and bool(p.tiles) == prompts] for prompts in (False, True))
        largest = [self._step(programs[-1]) for programs in (mixed, decodes)]
        first = dict.fromkeys(
            [*(job for *_, job in largest), *(job for jobs in largest for job in jobs), *self._programs.others()]
        )
        self._compile_now(list(first), progress)
        rest = dict.fromkeys([*(job for program in buckets.programs for job in self._step(program)), *reversed(listing)])
        left = [job for job in rest if job not in first]
        logger.info("%d programs are left to compile, while requests are served by larger ones", len(left))
        self._queue = CompileQueue(left, Job.run, max(1, num_threads() // 2))
        weakref.finalize(self, self._queue.close)  # threads do not compile for an engine that is gone

    def start(self) -> None:
        """Begin to compile the programs that `compile_first` left, in the background."""
        if self._queue is not None:
            self._queue.start()

    def choose(self, step: Program) -> Program:
        """Choose the forward program of a step of these sizes: the smallest one, or the smallest that is there."""
        own = self._programs.buckets.choose(step)
        if self._queue is None or self._can_run(own):
            return own
        self._queue.want(self._step(own))
        # a list, as threads add programs: it is made at once, and nothing else made of a dictionary is
        return min(p for p in list(self._programs.forward) if p.can_run(step) and self._can_run(p))

    def choose_sampling(self, sampling: Sampling) -> Sampling:
        """Choose the sampling program of a step: its own, or the quickest that is there and draws the same tokens.

        Updates of logits come in as many rows as the step's program has, so that no other number of rows can stand in.
        """
        if self._queue is None or sampling in self._programs.sample:
            return sampling
        self._queue.want([Job(self._programs.sample, sampling)])
        rows, mode, adjusted, adapted = sampling
        there = [s for s in list(self._programs.sample) if s.adapted == adapted and (s.rows == rows or not adapted)]
        return min(s for s in there if s.rows >= rows and s.mode >= mode and s.adjusted >= adjusted)

    def _step(self, program: Program) -> tuple[Job, ...]:
        """Name the programs of a step: those that sample whatever its rows need, and its forward program."""
        rows = self._programs.buckets.sampled_rows(program)
        kinds = [Sampling(rows, SamplingMode.LOGPROBS, True, adapted) for adapted in (False, True)[: 1 + program.extras]]
        return (*(Job(self._programs.sample, kind) for kind in kinds), Job(self._programs.forward, program))

    def _can_run(self, program: Program) -> bool:
        return all(job.key in job.programs for job in self._step(program))

    def close(self) -> None:
        """Stop to compile."""
        if self._queue is not None:
            self._queue.close()

    def _compile_now(self, jobs: Sequence[Job], progress: Progress) -> None:
        begin, threads = time.perf_counter(), num_threads()
        text = "compiling %d programs on %d threads: about %.0f s, or a few where they are in the compilation cache"
        logger.info(text, len(jobs), threads, self._compile_s(jobs) / threads)
        lock, done = threading.Lock(), 0

        def run(job: Job) -> None:
            nonlocal done
            job.run()
            with lock:
                done += 1
                progress(done, len(jobs))

        on_threads(run, jobs)
        logger.info("%d programs are compiled, in %.1f s", len(jobs), time.perf_counter() - begin)

    def _compile_s(self, jobs: Sequence[Job]) -> float:
        """Estimate the processor's seconds to compile programs, from counts."""
        programs = [job.key for job in jobs if job.programs is self._programs.forward]
        layer_s = sum((bool(p.rows) + bool(p.tiles)) * (LAYER_S + ADAPTED_S * bool(p.adapted)) for p in programs)
        return len(programs) * FORWARD_S + layer_s * self._num_layers + (len(jobs) - len(programs)) * OTHER_S
