"""Packs what one step needs into a few fresh host arrays, padded to a bucket.

Fresh on purpose: a dispatched step may still be reading its arguments when the next one is packed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from chameleon_jax.models.ops.batched_lora import plan_batch
from chameleon_jax.models.ops.batched_lora.plan import PlacedAdapter
from chameleon_jax.models.sampling import MAX_BANNED, SamplingMode, SamplingRows
from chameleon_jax.models.steps import DECODE_TILE, FROM_SLOT, StepBuckets, StepInputs


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one sequence.

    Attributes:
        tokens: their ids; None for one token that the device has (decode).
        start: position of the first.
        slot: the sequence's place among the running ones.
        pages: the sequence's block table.
        adapter: None for the base model.
    """

    tokens: Sequence[int] | None
    start: int
    slot: int
    pages: Sequence[int]
    adapter: PlacedAdapter | None


def pack_step(segments: Sequence[Segment], buckets: StepBuckets) -> tuple[StepInputs, list[int]]:
    """Packs one step of decode rows (all `tokens` None) or of prefill chunks.

    Returns:
        The inputs, and for each segment the tile that holds its last token.
    """
    decode = segments[0].tokens is None
    size = DECODE_TILE if decode else buckets.prefill_tile
    lengths = [1 if s.tokens is None else len(s.tokens) for s in segments]
    counts = [-(-n // size) for n in lengths]
    tiles = buckets.bucket(sum(counts), size)
    tokens = np.zeros(tiles * size, np.int32)
    table = np.zeros((tiles, 3 + buckets.table_width), np.int32)
    table[:, 2] = buckets.max_num_seqs  # padding's slot
    adapters: list[PlacedAdapter | None] = []
    last: list[int] = []
    tile = 0
    for segment, length, count in zip(segments, lengths, counts):
        rows = slice(tile, tile + count)
        tokens[tile * size : tile * size + length] = FROM_SLOT if segment.tokens is None else segment.tokens
        table[rows, 0] = segment.start + size * np.arange(count)
        table[rows, 1] = np.minimum(size, length - size * np.arange(count))
        table[rows, 2] = segment.slot
        table[rows, 3 : 3 + len(segment.pages)] = segment.pages
        adapters += [segment.adapter] * count
        tile += count
        last.append(tile - 1)
    lora = None
    needed = max((a.placement.num_targets for a in adapters if a is not None), default=0)
    if needed:
        lora = plan_batch(
            adapters,
            tiles=tiles,
            tile_tokens=size,
            max_rank=buckets.max_rank,
            max_pages=buckets.max_adapter_pages,
            num_targets=min(n for n in buckets.adapted(size) if n >= needed),
            decode_window=buckets.decode_window,
        )
    return StepInputs(tokens=tokens, tiles=table, lora=lora), last


@dataclasses.dataclass(frozen=True)
class Draw:
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


def pack_draws(draws: dict[int, Draw], rows: int, padding_slot: int) -> tuple[SamplingRows, SamplingMode]:
    """Packs `row -> Draw`; rows without one draw a token that nobody reads."""
    integers = np.full((rows, 5 + MAX_BANNED), -1, np.int32)
    integers[:, :5] = (padding_slot, 0, 0, 0, 0)
    floats = np.tile(np.array([0.0, 1.0, 0.0], np.float32), (rows, 1))
    mode = SamplingMode.GREEDY
    for row, draw in draws.items():
        seed = np.array([draw.seed & 0xFFFFFFFF, draw.seed >> 32 & 0xFFFFFFFF], np.uint32).view(np.int32)
        integers[row, :5] = (draw.slot, draw.position, *seed, max(draw.top_k, 0))
        integers[row, 5 : 5 + len(draw.banned)] = draw.banned
        floats[row] = (draw.temperature, draw.top_p, draw.min_p)
        if draw.logprobs:
            mode = SamplingMode.LOGPROBS
        elif draw.temperature > 0 and mode is SamplingMode.GREEDY:
            mode = SamplingMode.RANDOM
    return SamplingRows(integers=integers, floats=floats), mode
