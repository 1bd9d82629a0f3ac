"""Cases of the device ops at any size: tests compare small ones with NumPy, `device` compares large ones with the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chameleon_jax.models.config import TARGETS

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Targets that share an input, as the model adapts them."""


def attention_rows(tile_tokens: int, longest: int, page_tokens: int) -> tuple[list[int], list[int]]:
    """List the first position and the number of tokens of each row of a step, with rows of padding among and after them.

    Args:
        tile_tokens: Tokens of a row at most; 1 for decode.
        longest: Tokens of the longest sequence.
        page_tokens: Tokens of a page, whose ends are among the lengths of sequences.
    """
    if tile_tokens == 1:
        starts = [0, longest - 1, 7, page_tokens - 1, 2 * page_tokens + 1, longest // 2, 0]
        return starts, [1, 1, 0, 1, 1, 1, 0]
    starts = [0, 0, tile_tokens + 8, longest - tile_tokens, tile_tokens, longest // 2, 0, 0]
    return starts, [tile_tokens, tile_tokens // 4 + 1, 0, tile_tokens, tile_tokens, tile_tokens // 2, 1, 0]


def paged_kv(
    rng: np.random.Generator, lengths: Sequence[int], width: int, kv_heads: int, page_tokens: int, head_dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the KV of sequences on scattered pages. All other places hold NaN, as earlier owners may have left it.

    Returns:
        The pool, `[pages, 2, kv_heads, page_tokens, head_dim]` float32, and block tables, `[sequences, width]` int32.
    """
    used = [-(-length // page_tokens) for length in lengths]
    pages = iter(1 + rng.permutation(sum(used) + 5))
    pool = np.full((sum(used) + 6, 2, kv_heads, page_tokens, head_dim), np.nan, np.float32)
    tables = np.zeros((len(lengths), width), np.int32)
    for table, length, count in zip(tables, lengths, used):
        table[:count] = [next(pages) for _ in range(count)]
        position = np.arange(length)
        kv = rng.standard_normal((length, 2, kv_heads, head_dim), np.float32)
        pool[table[position // page_tokens], :, :, position % page_tokens] = kv
    return pool, tables


def adapter_ranks(ranks: Sequence[int]) -> list[dict[str, int]]:
    """List ranks by target of adapters: 1 and `ranks`, the largest last, on all targets, and two adapters of few targets."""
    everything = [dict.fromkeys(TARGETS, rank) for rank in (1, *ranks)]
    return [*everything, {"q_proj": 5, "v_proj": ranks[-1] // 2 + 2}, {"down_proj": 7}]
