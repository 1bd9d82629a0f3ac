"""The programs that run on the device, one for each shape bucket, compiled before the first request.

`forward` runs a batch of tiles through the model and `sample` chooses tokens from its last hidden states; apart, so that
their variants add up instead of multiplying. Sampled tokens stay on the device, one place for each running request
(`slot_tokens`), and feed the next step from there: the host never waits for a token before it can dispatch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chameleon_jax.models.config import ATTENTION_TARGETS, TARGETS
from chameleon_jax.models.llama import Llama, logits
from chameleon_jax.models.ops import INSIDE
from chameleon_jax.models.ops.batched_lora import DECODE_WINDOW, LoraPlan, batched_lora, plan_shapes, resolve, window_tiles
from chameleon_jax.models.ops.paged_attention import paged_attention, write_kv
from chameleon_jax.models.ops.write_pages import write_pages
from chameleon_jax.models.page_layout import PageLayout
from chameleon_jax.models.sampling import DRAW_COLUMNS, Sampled, SamplingMode, sample
from chameleon_jax.scheduler.prefill_shapes import PREFILL_TILE, PrefillShapes

DECODE_TILE = 1
FROM_SLOT = -1
"""A token id that says: take the token that was last sampled for this slot."""


class Program(NamedTuple):
    """Key of a forward program.

    Attributes:
        tiles: tiles of the step, padding included.
        tile_tokens: tokens of a tile.
        adapted: how many of TARGETS are adapted; 0: a program without LoRA work.
    """

    tiles: int
    tile_tokens: int
    adapted: int


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """The parts of a step's one input array, as views (host) or slices (device); padding tiles come last and have count 0.

    One array, as each one that is sent waits for the program before it: eight were predicted to cost an H100 1 to 2 % of a
    decode step.

    Attributes:
        tokens: `[tiles * tile_tokens]` int32, or FROM_SLOT.
        tiles: `[tiles, 3 + table_width]` int32: position of the first token, tokens in the tile, slot, block table.
        draws: `[tiles, DRAW_COLUMNS]` int32: how the token behind each tile is drawn.
        lora: which adapters; None in a program that has no LoRA work.
    """

    tokens: Any
    tiles: Any
    draws: Any
    lora: LoraPlan | None = None


def forward(
    graph: Any,
    params: Any,
    pages: list[jax.Array],
    slot_tokens: jax.Array,
    packed: jax.Array,
    *,
    program: Program,
    buckets: StepBuckets,
    layout: PageLayout,
    backend: str,
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """Hidden states `[tiles, hidden]` of each tile's last token, the draws that came with the step, for `sample_step`, and the
    pool with the tokens' KV in it.

    Args:
        packed: the step's inputs, `[buckets.packed_size(program)]` int32.
        backend: of the device ops, one of `ops.BACKENDS`.
    """
    model: Llama = nnx.merge(graph, params)
    inputs = buckets.view(packed, program)
    tiles = inputs.tiles
    starts, counts, slots, tables = tiles[:, 0], tiles[:, 1], tiles[:, 2], tiles[:, 3:]
    num_tiles, tile_tokens, _ = program

    within = jnp.arange(tile_tokens)
    valid = within < counts[:, None]
    positions = jnp.where(valid, starts[:, None] + within, 0)  # [tiles, tile_tokens]
    page = jax.lax.div(positions, layout.page_tokens)
    page_ids = tables.at[jnp.arange(num_tiles)[:, None], page].get(**INSIDE)
    page_ids = jnp.where(valid, page_ids, pages[0].shape[0]).reshape(-1)
    page_slots = jax.lax.rem(positions, layout.page_tokens).reshape(-1)
    tokens = jnp.where(inputs.tokens == FROM_SLOT, jnp.repeat(slot_tokens.at[slots].get(**INSIDE), tile_tokens), inputs.tokens)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
        pages = write_kv(pages, k, v, page_ids, page_slots)
        tiled = q.reshape(num_tiles, tile_tokens, *q.shape[1:])
        kv_heads = layout.config.num_kv_heads
        attended = paged_attention(tiled, pages, tables, starts, counts, num_kv_heads=kv_heads, backend=backend)
        return attended.reshape(q.shape), pages

    adapt = None
    if inputs.lora is not None:
        targets = resolve(inputs.lora, layout, tile_tokens)

        def adapt(names: tuple[str, ...], y: jax.Array, x: jax.Array, pages: jax.Array) -> jax.Array:
            if not targets.adapts(names):
                return y
            with jax.named_scope("lora"):
                return batched_lora(y, x, pages, targets, names, backend=backend)

    hidden, pages = model(tokens, positions.reshape(-1), pages, attend, adapt)
    last = jnp.arange(num_tiles) * tile_tokens + jnp.maximum(counts - 1, 0)
    return hidden.at[last].get(**INSIDE), inputs.draws, pages


def sample_step(
    head: jax.Array, hidden: jax.Array, slot_tokens: jax.Array, draws: jax.Array, *, mode: SamplingMode, backend: str
) -> tuple[Sampled, jax.Array]:
    """Draws one token for each of `hidden [rows, hidden]` and puts it where the next step looks for it.

    Args:
        head: the output matrix, `Llama.output_matrix`.
        draws: `[rows, DRAW_COLUMNS]` int32, as `forward` returns them.
        backend: of the device ops, one of `ops.BACKENDS`.
    """
    sampled = sample(logits(hidden, head), draws, mode, guesses=7 if backend == "triton" else 1)
    return sampled, slot_tokens.at[draws[:, 0]].set(sampled.tokens)


def write_adapter(
    pages: list[jax.Array], block: jax.Array, page_ids: jax.Array, *, backend: str
) -> tuple[list[jax.Array], jax.Array]:
    """Puts a packed adapter `[layers, n, page_elems]` into pages `page_ids [n]`, all different, of every layer.

    Besides the pool it returns an unused number: the pool is donated to the next program, so that only another
    output can tell when this one was executed.
    """
    return write_pages(pages, block, page_ids, backend=backend), page_ids[0]


def shapes_for(backend: str) -> dict[str, Any]:
    """Fields of `StepBuckets` in which backends differ. On a GPU larger tiles of prompts do more of their work on tensor
    cores, which multiply 16 rows at least, so that smaller windows of decode save nothing."""
    return {"prefill_tile": 64, "attention_alone": True, "decode_window": 16} if backend == "triton" else {}


def powers_of_two(first: int, last: int) -> tuple[int, ...]:
    """first, 2 first, ... up to last, which is always among them."""
    sizes = list(itertools.takewhile(lambda n: n < last, (first << i for i in itertools.count())))
    return (*sizes, last)


@dataclasses.dataclass(frozen=True)
class StepBuckets:
    """Shapes that are compiled.

    Attributes:
        max_num_seqs: rows of the largest decode step.
        max_prefill_tokens: tokens of the largest prefill step.
        table_width: pages of the longest sequence.
        max_rank: largest LoRA rank.
        max_adapter_pages: pages of the largest adapter; 0: no adapters are served and no LoRA program is compiled.
        prefill_tile: tokens of one sequence handled as a unit in prefill.
        attention_alone: whether batches whose adapters keep to ATTENTION_TARGETS decode with programs of their own. On a GPU
            what is launched costs time even where it finds nothing to do.
        decode_window: rows that are multiplied with the same adapters in decode.
    """

    max_num_seqs: int
    max_prefill_tokens: int
    table_width: int
    max_rank: int
    max_adapter_pages: int
    prefill_tile: int = PREFILL_TILE
    attention_alone: bool = False
    decode_window: int = DECODE_WINDOW

    @property
    def decode(self) -> tuple[int, ...]:
        return powers_of_two(1, self.max_num_seqs)

    @property
    def prefill(self) -> tuple[int, ...]:
        """Tiles of `prefill_tile` tokens. From 8 on in half steps: padding is computed, and a prompt is bound by computing."""
        last = -(-self.max_prefill_tokens // self.prefill_tile)
        powers = powers_of_two(1, last)
        return tuple(sorted({*powers, *(n + n // 2 for n in powers if n >= 8 and n + n // 2 < last)}))

    @property
    def prefill_shapes(self) -> PrefillShapes:
        """Tiles and sizes of prefill steps, as the scheduler knows them."""
        return PrefillShapes(self.prefill_tile, self.prefill)

    def sizes(self, tile_tokens: int) -> tuple[int, ...]:
        """Buckets, in tiles, of a step of such tiles."""
        return self.decode if tile_tokens == DECODE_TILE else self.prefill

    def bucket(self, needed: int, tile_tokens: int) -> int:
        """The smallest bucket that holds `needed` tiles."""
        return next(n for n in self.sizes(tile_tokens) if n >= needed)

    def adapted(self, tile_tokens: int) -> tuple[int, ...]:
        """How many of TARGETS the programs for such tiles adapt, a program for each number."""
        if not self.max_adapter_pages:
            return (0,)
        alone = self.attention_alone and tile_tokens == DECODE_TILE
        return (0, len(ATTENTION_TARGETS), len(TARGETS)) if alone else (0, len(TARGETS))

    def _plan(self, program: Program) -> dict[str, int]:
        """Arguments of `plan_shapes`."""
        return {
            "tiles": program.tiles,
            "tile_tokens": program.tile_tokens,
            "max_rank": self.max_rank,
            "max_pages": self.max_adapter_pages,
            "num_targets": program.adapted,
            "decode_window": self.decode_window,
        }

    def _parts(self, program: Program) -> dict[str, tuple[int, ...]]:
        """Shapes of a packed step's parts by name, in order."""
        tiles, tile_tokens, adapted = program
        step = {"tokens": (tiles * tile_tokens,), "tiles": (tiles, 3 + self.table_width), "draws": (tiles, DRAW_COLUMNS)}
        return step | (plan_shapes(**self._plan(program)) if adapted else {})

    def packed_size(self, program: Program) -> int:
        """Elements of a packed step."""
        return sum(math.prod(shape) for shape in self._parts(program).values())

    def view(self, packed: Any, program: Program) -> StepInputs:
        """The parts of a packed step: views of a NumPy array, slices of a JAX array."""
        parts, begin = {}, 0
        for name, shape in self._parts(program).items():
            end = begin + math.prod(shape)
            part = packed[begin:end] if isinstance(packed, np.ndarray) else jax.lax.slice(packed, (begin,), (end,))
            parts[name] = part.reshape(shape)
            begin = end
        step = {name: parts.pop(name) for name in ("tokens", "tiles", "draws")}
        lora = None
        if parts:
            lora = LoraPlan(**parts, window_tiles=window_tiles(program.tiles, program.tile_tokens, self.decode_window))
        return StepInputs(**step, lora=lora)

    @property
    def sample_rows(self) -> tuple[int, ...]:
        """Rows of the sampling programs: whatever a forward step may end with."""
        return tuple(sorted({*self.decode, *self.prefill}))
