"""Programs that run on the device, one for each shape bucket, compiled before the first request.

`forward` runs a batch of tiles through the model, and `sample_step` chooses tokens from its last hidden states. They are apart
so that their variants add up instead of multiplying. Sampled tokens stay on the device, one place for each running request
(`slot_tokens`), and feed the next step from there: the host never waits for a token before it can dispatch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chameleon_jax.models.config import ALL_TARGETS, ATTENTION_TARGETS, TARGETS
from chameleon_jax.models.llama import Llama, logits
from chameleon_jax.models.ops import INSIDE
from chameleon_jax.models.ops.adapter_vectors import resolve_vectors, scale_and_shift
from chameleon_jax.models.ops.batched_lora import batched_lora
from chameleon_jax.models.ops.batched_lora.plan import (
    DECODE_WINDOW,
    LoraPlan,
    LoraTargets,
    plan_shapes,
    resolve,
    window_tiles,
)
from chameleon_jax.models.ops.paged_attention import paged_attention, write_kv
from chameleon_jax.models.ops.sampling import SAMPLING_COLUMNS, Sampled, SamplingMode, sample, sample_adjusted, score
from chameleon_jax.models.ops.write_pages import write_pages
from chameleon_jax.models.page_layout import PageLayout
from chameleon_jax.scheduler.prefill_shapes import PrefillShapes

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from chameleon_jax.models.ops.shapes import Block, Inputs, KeyValues, Outputs, PageIds, Pool, Pools, SlotTokens, TokenCounts

DECODE_TILE = 1
"""Tokens of a tile in decode."""
PREFILL_TILE = 32
"""Tokens of a tile in prefill on a CPU."""
FROM_SLOT = -1
"""Token id that stands for the token last sampled for this slot."""


class Program(NamedTuple):
    """Key of a forward program.

    Attributes:
        tiles: Tiles of the step, padding included.
        tile_tokens: Tokens of a tile.
        adapted: Targets, from the first of ALL_TARGETS on, that are adapted. 0: a program without LoRA work.
    """

    tiles: int
    tile_tokens: int
    adapted: int

    @property
    def extras(self) -> bool:
        """Whether adapters may change embeddings, the output matrix, and the outputs of the layers' matrices themselves."""
        return self.adapted > len(TARGETS)


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """Parts of a step's one input array, as views (host) or slices (device). Padding tiles come last and have count 0.

    The inputs are one array, as each array that is sent waits for the program before it. Eight arrays were predicted to cost an
    H100 1 to 2 % of a decode step.

    Attributes:
        tokens: Token ids, or FROM_SLOT.
        tiles: Position of the first token, tokens in the tile, slot, block table; `[tiles, 3 + width]`.
        sampling_rows: Parameters of the token behind each tile.
        lora: Adapters of the batch. None in a program without LoRA work.
    """

    tokens: Int[Any, " tokens"]
    tiles: Int[Any, "tiles 3+width"]
    sampling_rows: Int[Any, "tiles columns"]
    lora: LoraPlan | None = None


class Forwarded(NamedTuple):
    """Results of a step's forward program.

    Attributes:
        hidden: Hidden state of each tile's last token.
        sampling_rows: Sampling rows that came with the step.
        pages: The pool with the tokens' KV in it.
        states: Of prompts, the hidden states of all tokens for `score_prompts`, as many rows as the largest step has tokens, so
            that one program scores steps of every size.
        logit_updates: Updates of adapters to the logits, float32, where the program has extras.
    """

    hidden: Float[Array, "tiles hidden"]
    sampling_rows: Int[Array, "tiles columns"]
    pages: Pools
    states: Float[Array, "most_tokens hidden"] | None
    logit_updates: Float[Array, "tiles vocab"] | None


def forward(
    graph: Any,
    params: Any,
    pages: Pools,
    slot_tokens: SlotTokens,
    packed: Int[Array, " packed"],
    *,
    program: Program,
    buckets: StepBuckets,
    layout: PageLayout,
    backend: str,
) -> Forwarded:
    """Run a step's tiles through the model.

    Args:
        graph: Model without its weights (`nnx.split`).
        params: Weights.
        pages: Pool of each layer.
        slot_tokens: Token last sampled for each slot; int32.
        packed: Inputs of the step, `buckets.packed_size(program)` elements; int32.
        program: Shape of the step.
        buckets: Shapes that are compiled.
        layout: Geometry of a page.
        backend: Backend of the device ops, one of `ops.BACKENDS`.
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

    def attend(
        q: Float[Array, "tokens heads head_dim"], k: KeyValues, v: KeyValues, pages: Pool
    ) -> tuple[Float[Array, "tokens heads head_dim"], Pool]:
        pages = write_kv(pages, k, v, page_ids, page_slots)
        tiled = q.reshape(num_tiles, tile_tokens, *q.shape[1:])
        kv_heads = layout.config.num_kv_heads
        attended = paged_attention(tiled, pages, tables, starts, counts, num_kv_heads=kv_heads, backend=backend)
        return attended.reshape(q.shape), pages

    adapt = adapt_embedding = None
    if inputs.lora is not None:
        targets = resolve(inputs.lora, layout, tile_tokens)
        vectors = resolve_vectors(inputs.lora, layout) if program.extras else None

        def adapt(names: tuple[str, ...], y: Outputs, x: Inputs, pages: Pool) -> Outputs:
            if not targets.adapts(names):
                return y
            with jax.named_scope("lora"):
                if vectors is not None:
                    y = scale_and_shift(y, pages, vectors, names)
                return batched_lora(y, x, pages, targets, names, backend=backend)

        if program.extras:
            adapt_embedding = functools.partial(_adapt_embedding, pages=pages, targets=targets, layout=layout, backend=backend)

    hidden, pages = model(tokens, positions.reshape(-1), pages, attend, adapt, adapt_embedding)
    last = jnp.arange(num_tiles) * tile_tokens + jnp.maximum(counts - 1, 0)
    states = updates = None
    if tile_tokens > 1:
        states = jnp.pad(hidden, ((0, buckets.most_prefill_tokens - len(hidden)), (0, 0)))
    hidden = hidden.at[last].get(**INSIDE)
    if inputs.lora is not None and program.extras:
        by_tile = resolve(inputs.lora, layout, 1)
        updates = _logit_updates(hidden, pages, by_tile, layout, backend)
    return Forwarded(hidden, inputs.sampling_rows, pages, states, updates)


def _adapt_embedding(
    x: Float[Array, "tokens hidden"],
    tokens: Int[Array, " tokens"],
    *,
    pages: Pools,
    targets: LoraTargets,
    layout: PageLayout,
    backend: str,
) -> Float[Array, "tokens hidden"]:
    """Add the adapters' updates of the embedding, a layer's part of the vocabulary after the other.

    A part's input is a one where it has the token. In a product with A that reads a column, and the other parts add zero.
    """
    cut = layout.config.vocab_cut
    with jax.named_scope("lora_embedding"):
        for layer, pool in enumerate(pages):
            one_hot = jax.nn.one_hot(tokens - layer * cut, cut, dtype=x.dtype)
            x = batched_lora(x, one_hot, pool, targets, ("embed_tokens",), backend=backend)
    return x


def _logit_updates(
    hidden: Float[Array, "tiles hidden"], pages: Pools, targets: LoraTargets, layout: PageLayout, backend: str
) -> Float[Array, "tiles vocab"]:
    """Compute the adapters' updates to the logits, by their updates of the output matrix: a part for each layer."""
    config = layout.config
    nothing = jnp.zeros((len(hidden), config.vocab_cut), jnp.float32)
    with jax.named_scope("lora_head"):
        parts = [batched_lora(nothing, hidden, pool, targets, ("lm_head",), backend=backend) for pool in pages]
    return jnp.concatenate(parts, axis=1)[:, : config.vocab_size]


def sample_step(
    head: Float[Array, "vocab hidden"],
    hidden: Float[Array, "rows hidden"],
    slot_tokens: SlotTokens,
    sampling_rows: Int[Array, "rows columns"],
    *,
    mode: SamplingMode,
    backend: str,
) -> tuple[Sampled, SlotTokens]:
    """Sample one token a row and put it into its slot, where the next step looks for it.

    Args:
        head: Output matrix (`Llama.output_matrix`).
        hidden: Hidden states, as `forward` returns them.
        slot_tokens: Token last sampled for each slot; int32.
        sampling_rows: Packed parameters, as `forward` returns them.
        mode: Kind of sampling that the rows need together.
        backend: Backend of the device ops, one of `ops.BACKENDS`.
    """
    sampled = sample(logits(hidden, head), sampling_rows, mode, guesses=7 if backend == "triton" else 1)
    return sampled, slot_tokens.at[sampling_rows[:, 0]].set(sampled.tokens)


def sample_adjusted_step(
    head: Float[Array, "vocab hidden"],
    hidden: Float[Array, "rows hidden"],
    slot_tokens: SlotTokens,
    counts: TokenCounts,
    sampling_rows: Int[Array, "rows columns"],
    adjustments: Int[Array, "rows _"],
    logit_updates: Float[Array, "rows vocab"] | None = None,
    *,
    mode: SamplingMode,
    backend: str,
) -> tuple[Sampled, SlotTokens, TokenCounts]:
    """Sample as `sample_step` does, from logits that `adjustments` change; `sampling.sample_adjusted` says how.

    `logit_updates` are added to the logits first; `forward` returns them.
    """
    guesses = 7 if backend == "triton" else 1
    found = logits(hidden, head)
    if logit_updates is not None:
        found = found + logit_updates
    sampled, counts = sample_adjusted(found, sampling_rows, adjustments, counts, mode, guesses)
    return sampled, slot_tokens.at[sampling_rows[:, 0]].set(sampled.tokens), counts


def score_prompts(
    head: Float[Array, "vocab hidden"], states: Float[Array, "most_tokens hidden"], packed: Int[Array, " packed"], *, tile: int
) -> Sampled:
    """Compute the log-probabilities of the tokens that follow some tokens of prompts.

    Args:
        head: Output matrix (`Llama.output_matrix`).
        states: Hidden states of a step's tokens, as `forward` returns them.
        packed: Number of tiles to compute, those tiles' numbers in a list as long as the tiles, and the token behind each
            token; int32.
        tile: Tokens of a tile.

    Returns:
        A row for each token; unspecified in tiles that are not computed.
    """
    tiles = states.shape[0] // tile
    count, numbers, targets = packed[0], packed[1 : 1 + tiles], packed[1 + tiles :]

    def rows(number: Int[Array, ""]) -> Sampled:
        hidden = jax.lax.dynamic_slice_in_dim(states, number * tile, tile)
        return score(logits(hidden, head), jax.lax.dynamic_slice_in_dim(targets, number * tile, tile))

    def one_tile(i: Int[Array, ""], found: Sampled) -> Sampled:
        place = numbers[i] * tile
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, place, 0), found, rows(numbers[i]))

    shapes = jax.eval_shape(rows, count)
    empty = jax.tree.map(lambda a: jnp.zeros((states.shape[0], *a.shape[1:]), a.dtype), shapes)
    return jax.lax.fori_loop(0, count, one_tile, empty)


def write_adapter(pages: Pools, block: Block, page_ids: PageIds, *, backend: str) -> tuple[Pools, Int[Array, ""]]:
    """Write a packed adapter into pages `page_ids`, all different, of every layer.

    Returns:
        The pool, and an unused number. The pool is donated to the next program, so that only another output can tell when this
        one was executed.
    """
    return write_pages(pages, block, page_ids, backend=backend), page_ids[0]


def shapes_for(backend: str) -> dict[str, Any]:
    """Look up the fields of `StepBuckets` in which backends differ.

    On a GPU larger tiles of prompts do more of their work on tensor cores. These multiply 16 rows at least, so that smaller
    windows of decode save nothing.
    """
    return {"prefill_tile": 64, "attention_alone": True, "decode_window": 16} if backend == "triton" else {}


def powers_of_two(first: int, last: int) -> tuple[int, ...]:
    """List first, 2 first, 4 first ... up to last, which is always in the list."""
    sizes = list(itertools.takewhile(lambda n: n < last, (first << i for i in itertools.count())))
    return (*sizes, last)


@dataclasses.dataclass(frozen=True)
class StepBuckets:
    """Shapes that are compiled.

    Attributes:
        max_num_seqs: Rows of the largest decode step.
        max_prefill_tokens: Tokens of the largest prefill step.
        table_width: Pages of the longest sequence.
        max_rank: Largest LoRA rank.
        max_adapter_pages: Pages of the largest adapter. 0: no adapters are served and no LoRA program is compiled.
        prefill_tile: Tokens of one sequence handled as a unit in prefill.
        attention_alone: Whether batches whose adapters keep to ATTENTION_TARGETS decode with programs of their own. On a GPU a
            launch costs time even where it finds nothing to do.
        decode_window: Rows that are multiplied with the same adapters in decode.
        extras: Whether there are programs for adapters with more than LoRA on the layers' matrices.
    """

    max_num_seqs: int
    max_prefill_tokens: int
    table_width: int
    max_rank: int
    max_adapter_pages: int
    prefill_tile: int = PREFILL_TILE
    attention_alone: bool = False
    decode_window: int = DECODE_WINDOW
    extras: bool = False

    @property
    def decode(self) -> tuple[int, ...]:
        """Rows of decode steps, ascending."""
        return powers_of_two(1, self.max_num_seqs)

    @property
    def prefill(self) -> tuple[int, ...]:
        """Tiles of prefill steps, ascending.

        From 8 on there are half steps too: padding is computed, and a prompt is bound by computing.
        """
        last = -(-self.max_prefill_tokens // self.prefill_tile)
        powers = powers_of_two(1, last)
        return tuple(sorted({*powers, *(n + n // 2 for n in powers if n >= 8 and n + n // 2 < last)}))

    @property
    def most_prefill_tokens(self) -> int:
        """Tokens of the largest prefill step, padding included."""
        return self.prefill[-1] * self.prefill_tile

    @property
    def prefill_shapes(self) -> PrefillShapes:
        """Tiles and sizes of prefill steps, as the scheduler knows them."""
        return PrefillShapes(self.prefill_tile, self.prefill)

    def sizes(self, tile_tokens: int) -> tuple[int, ...]:
        """List the buckets, in tiles, of steps of such tiles."""
        return self.decode if tile_tokens == DECODE_TILE else self.prefill

    def bucket(self, needed: int, tile_tokens: int) -> int:
        """Find the smallest bucket that holds `needed` tiles."""
        return next(n for n in self.sizes(tile_tokens) if n >= needed)

    def adapted(self, tile_tokens: int) -> tuple[int, ...]:
        """List the numbers of ALL_TARGETS that programs for such tiles adapt, a program for each number."""
        if not self.max_adapter_pages:
            return (0,)
        alone = self.attention_alone and tile_tokens == DECODE_TILE
        some = (0, len(ATTENTION_TARGETS), len(TARGETS)) if alone else (0, len(TARGETS))
        return (*some, len(ALL_TARGETS)) if self.extras else some

    def _parts(self, program: Program) -> dict[str, tuple[int, ...]]:
        """Compute the shapes of a packed step's parts by name, in order."""
        tiles, tile_tokens, adapted = program
        step = {
            "tokens": (tiles * tile_tokens,),
            "tiles": (tiles, 3 + self.table_width),
            "sampling_rows": (tiles, SAMPLING_COLUMNS),
        }
        if not adapted:
            return step
        return step | plan_shapes(
            tiles=tiles,
            tile_tokens=tile_tokens,
            max_rank=self.max_rank,
            max_pages=self.max_adapter_pages,
            num_targets=adapted,
            decode_window=self.decode_window,
        )

    def packed_size(self, program: Program) -> int:
        """Count the elements of a packed step."""
        return sum(math.prod(shape) for shape in self._parts(program).values())

    def view(self, packed: Int[Array | np.ndarray, " packed"], program: Program) -> StepInputs:
        """Take a packed step apart, into views of a NumPy array or slices of a JAX array."""
        parts: dict[str, Any] = {}
        begin = 0
        for name, shape in self._parts(program).items():
            end = begin + math.prod(shape)
            part = packed[begin:end] if isinstance(packed, np.ndarray) else jax.lax.slice(packed, (begin,), (end,))
            parts[name] = part.reshape(shape)
            begin = end
        step = {name: parts.pop(name) for name in ("tokens", "tiles", "sampling_rows")}
        lora = None
        if parts:
            lora = LoraPlan(**parts, window_tiles=window_tiles(program.tiles, program.tile_tokens, self.decode_window))
        return StepInputs(**step, lora=lora)

    @property
    def sample_rows(self) -> tuple[int, ...]:
        """Rows of the sampling programs: any number of tiles that a forward step may have."""
        return tuple(sorted({*self.decode, *self.prefill}))
