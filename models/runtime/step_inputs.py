"""Packing of a step's inputs into one host array, padded to a bucket.

The array is fresh for each step on purpose: a dispatched step may still be reading its own when the next one is packed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from chameleon_jax.models.ops.batched_lora.plan import fill_plan
from chameleon_jax.models.ops.sampling import (
    ADJUSTMENT_COLUMNS,
    LEAST_TEMPERATURE,
    SAMPLING_COLUMNS,
    SamplingMode,
)
from chameleon_jax.models.page_layout import PlacedAdapter
from chameleon_jax.models.runtime.buckets import FROM_SLOT, TILE_COLUMNS, Program, StepBuckets, StepInputs
from chameleon_jax.sampling_params import MAX_LOGIT_BIAS

if TYPE_CHECKING:
    from jaxtyping import Int


class SequenceChunk(NamedTuple):
    """Consecutive tokens of one sequence.

    Attributes:
        tokens: Token ids. None: one token that the device has (decode).
        start: Position of the first token.
        slot: Place of the sequence among the running ones.
        pages: Block table of the sequence; fastest where it is an `array("i")`.
        adapter: Adapter of the sequence. None: the base model.
    """

    tokens: Sequence[int] | None
    start: int
    slot: int
    pages: Sequence[int]
    adapter: PlacedAdapter | None


class Adjustment(NamedTuple):
    """Changes of one row's logits before a token is drawn.

    Attributes:
        presence: Presence penalty.
        frequency: Frequency penalty.
        repetition: Repetition penalty; 1 changes nothing.
        bias: Amounts added to the logits of tokens, by id.
    """

    presence: float
    frequency: float
    repetition: float
    bias: Mapping[int, float]


class SamplingRow(NamedTuple):
    """Sampling parameters of one row.

    Attributes:
        slot: Place of the sequence among the running ones.
        position: Position of the token to sample.
        seed: Seed of the row's random numbers, 64 bits.
        temperature: Temperature; greedy below LEAST_TEMPERATURE.
        top_k: Best tokens that stay candidates. 0 or less: all.
        top_p: Share of the mass that stays.
        min_p: Share of the best token's probability that a candidate needs.
        suppressed: Ids that cannot be sampled, MAX_STOP_IDS at most.
        logprobs: Whether log-probabilities are needed.
        adjustment: Changes of the logits. None: none.
    """

    slot: int
    position: int
    seed: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    suppressed: Sequence[int]
    logprobs: bool
    adjustment: Adjustment | None = None


class PackedStep(NamedTuple):
    """Step ready to be dispatched.

    Attributes:
        packed: Inputs (see `StepBuckets.view`).
        program: Forward program that takes them.
        first: Number of each chunk's first token in the step.
        mode: Sampling program. None: no token is sampled.
    """

    packed: Int[np.ndarray, " packed"]
    program: Program
    first: list[int]
    mode: SamplingMode | None


def pack_step(
    chunks: Sequence[SequenceChunk],
    sampling_rows: Mapping[int, SamplingRow],
    buckets: StepBuckets,
    choose: Callable[[Program], Program] | None = None,
) -> PackedStep:
    """Pack one step.

    Args:
        chunks: Chunks of the step, at least one: the rows that decode first (`tokens` None), then prompts.
        sampling_rows: `index of a chunk -> parameters of the token behind the chunk's last one`. The sampling rows of the step
            are in this order.
        buckets: Shapes that are compiled.
        choose: Chooses the program for a step of these sizes; None takes the smallest one that there is.
    """
    rows = sum([c.tokens is None for c in chunks])
    counts = [1 if c.tokens is None else len(c.tokens) for c in chunks]
    ends = list(itertools.accumulate(counts))
    needed = max([c.adapter.placement.num_targets for c in chunks if c.adapter is not None], default=0)
    sizes = Program(ends[-1], rows, sum(map(buckets.step_shapes.tiles, counts[rows:])), needed)
    program = buckets.choose(sizes) if choose is None else choose(sizes)
    packed, inputs = _empty_step(program, buckets)
    _fill_rows(inputs, chunks[:rows])
    if inputs.places is not None:
        _fill_prompts(inputs, chunks[rows:], program, buckets.prefill_tile)
    adapters = [c.adapter for c in chunks]
    _fill_adapters(inputs, adapters, counts, rows)
    inputs.sampled[: len(sampling_rows)] = [ends[i] - 1 for i in sampling_rows]
    if inputs.sampled_lora is not None:
        fill_plan(inputs.sampled_lora, [adapters[i] for i in sampling_rows], [1] * len(sampling_rows))
    mode = fill_sampling_rows(inputs.sampling_rows, list(sampling_rows.values()), buckets.max_num_seqs)
    return PackedStep(packed, program, [0, *ends[:-1]], mode if sampling_rows else None)


def pack_padding(program: Program, buckets: StepBuckets) -> Int[np.ndarray, " packed"]:
    """Pack a step of padding, which changes nothing."""
    packed, inputs = _empty_step(program, buckets)
    fill_sampling_rows(inputs.sampling_rows, [], buckets.max_num_seqs)
    for plan in (inputs.decode_lora, inputs.prompt_lora, inputs.sampled_lora):
        if plan is not None:
            fill_plan(plan, [], [])
    return packed


def _empty_step(program: Program, buckets: StepBuckets) -> tuple[Int[np.ndarray, " packed"], StepInputs]:
    """Make a step's array and views of its parts. All tokens are padding, and sampling rows and adapters are not filled in."""
    packed = np.zeros(buckets.packed_size(program), np.int32)
    inputs = buckets.view(packed, program)
    inputs.tiles[:, 3] = buckets.max_num_seqs  # padding's slot
    if inputs.places is not None:
        inputs.places.fill(-1)
    return packed, inputs


def _fill_rows(inputs: StepInputs, chunks: Sequence[SequenceChunk]) -> None:
    """Write the rows that decode."""
    rows = len(chunks)
    inputs.tokens[:rows] = FROM_SLOT
    inputs.tiles[:rows, 0] = np.arange(rows)
    inputs.tiles[:rows, 1] = [c.start for c in chunks]
    inputs.tiles[:rows, 2] = 1
    inputs.tiles[:rows, 3] = [c.slot for c in chunks]
    for table, chunk in zip(inputs.tiles[:, TILE_COLUMNS:], chunks):
        table[: len(chunk.pages)] = chunk.pages
    if inputs.places is not None:
        inputs.places[:rows] = np.arange(rows)


def _fill_prompts(inputs: StepInputs, chunks: Sequence[SequenceChunk], program: Program, tile: int) -> None:
    """Write the chunks of prompts behind the rows that decode, which are written."""
    assert inputs.places is not None
    begin, place = int(np.count_nonzero(inputs.places >= 0)), program.rows
    for chunk in chunks:
        assert chunk.tokens is not None
        length = len(chunk.tokens)
        before = np.arange(0, length, tile)
        tiles = inputs.tiles[program.rows + (place - program.rows) // tile :][: len(before)]
        tiles[:, 0] = begin + before
        tiles[:, 1] = chunk.start + before
        tiles[:, 2] = np.minimum(tile, length - before)
        tiles[:, TILE_COLUMNS : TILE_COLUMNS + len(chunk.pages)] = chunk.pages
        inputs.tokens[begin : begin + length] = chunk.tokens
        inputs.places[begin : begin + length] = np.arange(place, place + length)
        begin += length
        place += tile * len(before)


def _fill_adapters(inputs: StepInputs, adapters: Sequence[PlacedAdapter | None], counts: Sequence[int], rows: int) -> None:
    """Write the adapters of a step's chunks, the first `rows` of which decode."""
    if inputs.decode_lora is not None:
        fill_plan(inputs.decode_lora, adapters[:rows], counts[:rows])
    if inputs.prompt_lora is not None:
        fill_plan(inputs.prompt_lora, adapters[rows:], counts[rows:], begin=rows)


def pack_sampling_rows(
    sampling_rows: Sequence[SamplingRow], rows: int, padding_slot: int
) -> tuple[Int[np.ndarray, "rows columns"], SamplingMode]:
    """Pack sampling rows into `rows` rows, and choose the sampling program that they need together."""
    table = np.zeros((rows, SAMPLING_COLUMNS), np.int32)
    return table, fill_sampling_rows(table, sampling_rows, padding_slot)


def fill_sampling_rows(
    table: Int[np.ndarray, "rows columns"], sampling_rows: Sequence[SamplingRow], padding_slot: int
) -> SamplingMode:
    """Write sampling rows into a table of zeros, and choose the sampling program that they need together.

    The other rows of the table sample a token that nothing uses.
    """
    table[:, 0] = padding_slot
    table[:, 8:] = -1
    if not sampling_rows:
        return SamplingMode.GREEDY
    rows = len(sampling_rows)
    table[:rows, :2] = [row[:2] for row in sampling_rows]
    seeds = np.array([row.seed & 0xFFFFFFFFFFFFFFFF for row in sampling_rows], "<u8")
    table[:rows, 2:4] = seeds.view("<i4").reshape(-1, 2)
    table[:rows, 4] = [max(row.top_k, 0) for row in sampling_rows]
    floats = np.array([(0.0 if row.top_k == 1 else row.temperature, row.top_p, row.min_p) for row in sampling_rows], np.float32)
    table[:rows, 5:8] = floats.view(np.int32)
    for number, row in enumerate(sampling_rows):
        if row.suppressed:
            table[number, 8 : 8 + len(row.suppressed)] = row.suppressed
    if any([row.logprobs for row in sampling_rows]):
        return SamplingMode.LOGPROBS
    return SamplingMode.RANDOM if (floats[:, 0] >= LEAST_TEMPERATURE).any() else SamplingMode.GREEDY


def pack_adjustments(
    sampling_rows: Sequence[SamplingRow], masks: Int[np.ndarray, "masks words"], rows: int
) -> Int[np.ndarray, "rows columns"]:
    """Pack the adjustments of the first sampling rows, and their masks, into `rows` rows. The others change nothing."""
    table = np.zeros((rows, ADJUSTMENT_COLUMNS + masks.shape[1]), np.int32)
    table[:, 2] = np.float32(1).view(np.int32)
    table[:, 3 : 3 + MAX_LOGIT_BIAS] = -1
    table[:, ADJUSTMENT_COLUMNS:] = -1
    table[: len(masks), ADJUSTMENT_COLUMNS:] = masks
    for number, row in enumerate(sampling_rows):
        if row.adjustment is None:
            continue
        *penalties, bias = row.adjustment
        table[number, :3] = np.array(penalties, np.float32).view(np.int32)
        if bias:
            table[number, 3 : 3 + len(bias)] = list(bias)
            begin = 3 + MAX_LOGIT_BIAS
            table[number, begin : begin + len(bias)] = np.array(list(bias.values()), np.float32).view(np.int32)
    return table


def pack_counts(
    slot: int, prompt: Sequence[int], output: Sequence[int], vocab_size: int, size: int
) -> list[Int[np.ndarray, " packed"]]:
    """Pack a slot's tokens for `sampling.count_tokens`, `size` in each run, the first of which forgets earlier tokens."""
    tokens = np.array([*prompt, *(token + vocab_size for token in output)], np.int32)
    runs = []
    for begin in range(0, max(len(tokens), 1), size):
        packed = np.full(2 + size, 2 * vocab_size, np.int32)
        packed[:2] = slot, begin == 0
        part = tokens[begin : begin + size]
        packed[2 : 2 + len(part)] = part
        runs.append(packed)
    return runs
