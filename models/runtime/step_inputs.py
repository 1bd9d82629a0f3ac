"""Packs a step's inputs into one fresh host array, padded to a bucket.

Fresh on purpose: a dispatched step may still be reading its argument when the next one is packed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from chameleon_jax.models.ops.batched_lora import fill_plan
from chameleon_jax.models.page_layout import PlacedAdapter
from chameleon_jax.models.runtime.steps import DECODE_TILE, FROM_SLOT, Program, StepBuckets, StepInputs
from chameleon_jax.models.sampling import DRAW_COLUMNS, LEAST_TEMPERATURE, SamplingMode


class SequenceChunk(NamedTuple):
    """Consecutive tokens of one sequence.

    Attributes:
        tokens: their ids; None for one token that the device has (decode).
        start: position of the first.
        slot: the sequence's place among the running ones.
        pages: the sequence's block table; fastest where it is an `array("i")`.
        adapter: None for the base model.
    """

    tokens: Sequence[int] | None
    start: int
    slot: int
    pages: Sequence[int]
    adapter: PlacedAdapter | None


class Draw(NamedTuple):
    """How one row's token is drawn. `position` is the token's own; `banned` ids cannot be drawn."""

    slot: int
    position: int
    seed: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    banned: Sequence[int]
    logprobs: bool


class PackedStep(NamedTuple):
    """A step ready to be dispatched.

    Attributes:
        packed: the inputs, see `StepBuckets.view`.
        program: the forward program that takes them.
        last: for each segment the tile that holds its last token.
        mode: the sampling program; None: nothing is drawn.
    """

    packed: np.ndarray
    program: Program
    last: list[int]
    mode: SamplingMode | None


def pack_step(segments: Sequence[SequenceChunk], draws: Mapping[int, Draw], buckets: StepBuckets) -> PackedStep:
    """Packs one step of decode rows (all `tokens` None) or of prefill chunks.

    Args:
        draws: `index of a segment -> how the token behind its last one is drawn`.
    """
    decode = segments[0].tokens is None
    size = DECODE_TILE if decode else buckets.prefill_tile
    counts = [1 if s.tokens is None else -(-len(s.tokens) // size) for s in segments]
    ends = np.cumsum(counts)
    last = (ends - 1).tolist()
    needed = max([s.adapter.placement.num_targets for s in segments if s.adapter is not None], default=0)
    program = Program(
        tiles=buckets.bucket(last[-1] + 1, size),
        tile_tokens=size,
        adapted=min(n for n in buckets.adapted(size) if n >= needed) if needed else 0,
    )
    packed, inputs = _empty_step(program, buckets)
    if decode:
        rows = len(segments)
        inputs.tokens[:rows] = FROM_SLOT
        inputs.tiles[:rows, 0] = [s.start for s in segments]
        inputs.tiles[:rows, 1] = 1
        inputs.tiles[:rows, 2] = [s.slot for s in segments]
        for table, segment in zip(inputs.tiles[:, 3:], segments):
            table[: len(segment.pages)] = segment.pages
    else:
        for segment, end, count in zip(segments, ends.tolist(), counts):
            _fill_chunk(inputs.tokens[(end - count) * size :], inputs.tiles[end - count : end], segment, size)
    if inputs.lora is not None:
        fill_plan(inputs.lora, [s.adapter for s, count in zip(segments, counts) for _ in range(count)])
    mode = fill_draws(inputs.draws, {last[i]: draw for i, draw in draws.items()}, buckets.max_num_seqs)
    return PackedStep(packed, program, last, mode if draws else None)


def pack_padding(program: Program, buckets: StepBuckets) -> np.ndarray:
    """The inputs of a step of padding, which changes nothing."""
    packed, inputs = _empty_step(program, buckets)
    fill_draws(inputs.draws, {}, buckets.max_num_seqs)
    if inputs.lora is not None:
        fill_plan(inputs.lora, [])
    return packed


def _empty_step(program: Program, buckets: StepBuckets) -> tuple[np.ndarray, StepInputs]:
    """A step's array, and its parts: all tiles are padding, draws and adapters are still to be filled in."""
    packed = np.zeros(buckets.packed_size(program), np.int32)
    inputs = buckets.view(packed, program)
    inputs.tiles[:, 2] = buckets.max_num_seqs  # padding's slot
    return packed, inputs


def _fill_chunk(tokens: np.ndarray, tiles: np.ndarray, segment: SequenceChunk, size: int) -> None:
    """Writes a chunk of a prompt into its tiles, and its tokens from the first one on."""
    assert segment.tokens is not None
    length, before = len(segment.tokens), size * np.arange(len(tiles))
    tokens[:length] = segment.tokens
    tiles[:, 0] = segment.start + before
    tiles[:, 1] = np.minimum(size, length - before)
    tiles[:, 2] = segment.slot
    tiles[:, 3 : 3 + len(segment.pages)] = segment.pages


def pack_draws(draws: Mapping[int, Draw], rows: int, padding_slot: int) -> tuple[np.ndarray, SamplingMode]:
    """`[rows, DRAW_COLUMNS]` int32 of `row -> Draw`, and the sampling program that they need."""
    table = np.zeros((rows, DRAW_COLUMNS), np.int32)
    return table, fill_draws(table, draws, padding_slot)


def fill_draws(table: np.ndarray, draws: Mapping[int, Draw], padding_slot: int) -> SamplingMode:
    """Writes `row -> Draw` into `table` `[rows, DRAW_COLUMNS]`, zeros; rows without one draw an unused token."""
    table[:, 0] = padding_slot
    table[:, 8:] = -1
    if not draws:
        return SamplingMode.GREEDY
    rows, values = list(draws), list(draws.values())
    table[rows, :2] = [d[:2] for d in values]
    seeds = np.array([d.seed & 0xFFFFFFFFFFFFFFFF for d in values], "<u8")
    table[rows, 2:4] = seeds.view("<i4").reshape(-1, 2)
    table[rows, 4] = [max(d.top_k, 0) for d in values]
    floats = np.array([(0.0 if d.top_k == 1 else d.temperature, d.top_p, d.min_p) for d in values], np.float32)
    table[rows, 5:8] = floats.view(np.int32)
    for row, draw in draws.items():
        if draw.banned:
            table[row, 8 : 8 + len(draw.banned)] = draw.banned
    if any([d.logprobs for d in values]):
        return SamplingMode.LOGPROBS
    return SamplingMode.RANDOM if (floats[:, 0] >= LEAST_TEMPERATURE).any() else SamplingMode.GREEDY
