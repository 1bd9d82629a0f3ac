"""Executor on a JAX device: packs plans into arrays, and dispatches them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from chameleon_jax.executor import LoadResult, SampledToken
from chameleon_jax.models.adapters.host_store import HostStore
from chameleon_jax.models.adapters.transfers import PinnedBlock
from chameleon_jax.models.ops.sampling import Sampled
from chameleon_jax.models.page_layout import AdapterPlacement, PlacedAdapter
from chameleon_jax.models.runtime.adapter_loads import AdapterLoads
from chameleon_jax.models.runtime.model_runner import DispatchedStep, ModelRunner, RunningStep
from chameleon_jax.models.runtime.step_inputs import Adjustment, SamplingRow, SequenceChunk
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler import PrefillChunk, StepPlan


@dataclasses.dataclass
class Step:
    """A step that was dispatched.

    Attributes:
        running: The dispatched forward program.
        owners: Owner of each sampling row.
        drawn: The dispatched sampling program; None while guided rows wait for their masks.
        scores: Log-probabilities of prompts' own tokens; None where none are wanted.
        scored: Runs of tokens that `scores` has.
    """

    running: RunningStep
    owners: list[Request]
    drawn: DispatchedStep | None = None
    scores: Sampled | None = None
    scored: Sequence[ScoredRun] = ()


class ScoredRun(NamedTuple):
    """Consecutive tokens of a prompt whose log-probabilities a step computes.

    Attributes:
        row: Row of the first one in the scores.
        begin: Its position in the prompt.
        end: Position behind the last one.
    """

    request: Request
    row: int
    begin: int
    end: int


class JaxExecutor:
    """`Executor` over a `ModelRunner`.

    Args:
        store: Packed adapters in host memory.
    """

    def __init__(self, runner: ModelRunner, store: HostStore):
        self._runner = runner
        self._store = store
        self._loads = AdapterLoads(runner, store)
        self._placements: dict[str, AdapterPlacement] = {}  # of every adapter that was added
        self._loading: dict[str, PlacedAdapter] = {}
        self._resident: dict[str, PlacedAdapter] = {}
        self._in_flight: list[Step] = []  # dispatched and not collected
        self._counted: dict[int, tuple[Request, int]] = {}  # by slot: request whose tokens the device counts, its preemptions

    @property
    def num_compiled(self) -> int | None:
        return None if self._runner.compilation.runs_beside else self._runner.programs.num_compiled

    def restart(self, transfers_per_load: int) -> None:
        """Send each adapter so many times a load from now on, and forget the pace of steps. No load may be under way."""
        self._loads.restart(transfers_per_load)

    def add(self, content_hash: str, placement: AdapterPlacement, block: PinnedBlock) -> None:
        """Take a packed adapter in.

        Args:
            content_hash: Its identity.
            placement: Places of its rows in its pages.
            block: Its packed array, as `ModelRunner.stage` returns it.
        """
        self._store.put(content_hash, block)
        self._placements[content_hash] = placement

    def placement(self, content_hash: str) -> AdapterPlacement:
        """Return the places of an adapter's rows in its pages. Raises KeyError for one that was not added."""
        return self._placements[content_hash]

    def dispatch(self, plan: StepPlan) -> Step:
        decodes, prompts = plan.decodes, plan.prefills
        rows = [(i, request, request.num_computed) for i, request in enumerate(decodes)]
        rows += [(i, c.request, c.start + c.num_tokens) for i, c in enumerate(prompts, len(decodes)) if c.samples]
        sampling_rows = {i: _sampling_row(request, position) for i, request, position in rows}
        sent = self._runner.send([*map(self._row, decodes), *map(self._chunk, prompts)], sampling_rows)
        self._loads.send_beside_step()  # behind the step's inputs and ahead of its programs: see `link_pace`
        step = Step(self._runner.forward(sent), [request for _, request, _ in rows])
        self._score(step, prompts, step.running.step.first[len(decodes) :])
        if not step.running.adjusted or all(request.guide is None for request in step.owners):
            self._draw(step)
        self._in_flight.append(step)
        return step

    def draw(self, handle: Step) -> None:
        if handle.drawn is None:
            self._draw(handle)

    def collect(self, handle: Step) -> list[SampledToken]:
        assert handle.drawn is not None
        _keep_scores(handle)
        tokens = []
        if handle.drawn.sampled is None:
            jax.block_until_ready(handle.drawn.done)
        else:
            host = jax.tree.map(np.asarray, handle.drawn.sampled)
            for row, (request, token) in enumerate(zip(handle.owners, host.tokens.tolist())):
                tokens.append(SampledToken(request, token, _logprobs(host, row, request.params.logprobs)))
        self._in_flight = [other for other in self._in_flight if other is not handle]
        return tokens

    def begin_load(self, content_hash: str, pages: list[int]) -> None:
        self._resident.pop(content_hash, None)
        self._loading[content_hash] = PlacedAdapter(self._placements[content_hash], tuple(pages))
        self._loads.begin(content_hash, pages)

    def poll_loads(self, wait: bool = False) -> list[LoadResult]:
        ended = self._loads.poll(wait, idle=not self._in_flight)
        for result in ended:
            adapter = self._loading.pop(result.content_hash)
            if result.error is None:
                self._resident[result.content_hash] = adapter
        return ended

    def cancel_load(self, content_hash: str) -> None:
        del self._loading[content_hash]
        self._loads.cancel(content_hash)

    def forget(self, content_hash: str) -> None:
        self._store.remove(content_hash)
        self._placements.pop(content_hash, None)
        self._resident.pop(content_hash, None)

    def reset(self) -> None:
        self._loads.reset()
        self._loading.clear()
        self._resident.clear()
        self._in_flight.clear()
        self._counted.clear()
        self._runner.reset()

    def _score(self, step: Step, prompts: Sequence[PrefillChunk], first: Sequence[int]) -> None:
        """Dispatch the log-probabilities of prompts' own tokens, where some are wanted.

        Args:
            step: The step.
            prompts: Its chunks of prompts.
            first: Number of each one's first token in the step.
        """
        step.scored = _scored_runs(prompts, first)
        if step.scored:
            following = np.full(step.running.step.program.tokens, -1, np.int32)
            for request, row, begin, end in step.scored:
                following[row : row + end - begin] = request.prompt_token_ids[begin:end]
            step.scores = self._runner.score(step.running, following)

    def _draw(self, step: Step) -> None:
        masks = None
        if step.running.adjusted:
            for request in step.owners:
                if request.finish_reason is None:  # else its slot is gone, and its token dropped
                    self._count(request)
            masks = self._masks(step)
        step.drawn = self._runner.sample(step.running, masks)
        for array in jax.tree.leaves(step.drawn.sampled):
            array.copy_to_host_async()  # on its way while the next step is dispatched

    def _count(self, request: Request) -> None:
        """Have the device count the tokens so far of a request with penalties, unless it does."""
        now = (request, request.metrics.num_preemptions)
        if request.params.penalises and self._counted.get(request.slot) != now:
            self._counted[request.slot] = now
            prompt = request.prompt_token_ids if request.params.repetition_penalty != 1 else ()
            self._runner.count(request.slot, prompt, request.output_token_ids)

    def _masks(self, step: Step) -> np.ndarray | None:
        """Tokens that each row can draw; None where no row has a mask."""
        if all(request.guide is None and request.allowed is None for request in step.owners):
            return None
        masks = self._runner.no_masks(len(step.owners))
        running = [(row, r) for row, r in enumerate(step.owners) if r.finish_reason is None]
        guides = [(row, request.guide) for row, request in running if request.guide is not None]
        if guides:
            from chameleon_jax.structured_outputs import fill_masks  # here, since other requests run without the package

            fill_masks(guides, masks)
        for row, request in running:
            if request.allowed is not None:
                masks[row] &= request.allowed
        return masks

    def _chunk(self, chunk: PrefillChunk) -> SequenceChunk:
        request = chunk.request
        tokens = [request.token(i) for i in range(chunk.start, chunk.start + chunk.num_tokens)]
        return SequenceChunk(tokens, chunk.start, request.slot, request.pages, self._adapter(request))

    def _row(self, request: Request) -> SequenceChunk:
        return SequenceChunk(None, request.num_computed - 1, request.slot, request.pages, self._adapter(request))

    def _adapter(self, request: Request) -> PlacedAdapter | None:
        return None if request.adapter is None else self._resident[request.adapter]


def _sampling_row(request: Request, position: int) -> SamplingRow:
    """Return the sampling parameters of the token at `position`."""
    params = request.params
    drawn = position - len(request.prompt_token_ids)
    return SamplingRow(
        slot=request.slot,
        position=position,
        seed=request.seed,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        suppressed=sorted(request.stop_ids) if drawn < params.min_tokens else (),
        logprobs=params.logprobs is not None,
        adjustment=_adjustment(params) if request.adjusts else None,
    )


def _adjustment(params: SamplingParams) -> Adjustment:
    bias = params.logit_bias or {}
    return Adjustment(params.presence_penalty, params.frequency_penalty, params.repetition_penalty, bias)


def _scored_runs(chunks: Sequence[PrefillChunk], first: Sequence[int]) -> list[ScoredRun]:
    """List the tokens whose log-probabilities are wanted: the token at a position is scored by the one before.

    Args:
        chunks: Prompts of the step.
        first: Number of each one's first token in the step.
    """
    runs = []
    for chunk, row in zip(chunks, first):
        request = chunk.request
        end = min(chunk.start + chunk.num_tokens + 1, len(request.prompt_token_ids))
        if request.params.prompt_logprobs is not None and chunk.start + 1 < end:
            runs.append(ScoredRun(request, row, chunk.start + 1, end))
    return runs


def _keep_scores(step: Step) -> None:
    """Write the log-probabilities of prompts' own tokens into their requests."""
    if step.scores is None:
        return
    host = jax.tree.map(np.asarray, step.scores)
    for request, first, begin, end in step.scored:
        found = [_logprobs(host, first + i, request.params.prompt_logprobs) for i in range(end - begin)]
        request.prompt_logprobs[begin:end] = found


def _logprobs(host: Sampled, row: int, n: int | None) -> dict[int, float] | None:
    """Log-probabilities of one row: its token first, then the `n` best ones. None where n is None."""
    if n is None:
        return None
    assert host.logprobs is not None and host.top_tokens is not None and host.top_logprobs is not None
    best = zip(host.top_tokens[row, :n].tolist(), host.top_logprobs[row, :n].tolist())
    return {int(host.tokens[row]): float(host.logprobs[row]), **dict(best)}
