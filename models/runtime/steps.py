"""Programs that run on the device, one for each shape bucket.

`forward` runs a batch of tiles through the model, and `sample_step` chooses tokens from its last hidden states. They are apart
so that their variants add up instead of multiplying. Sampled tokens stay on the device, one place for each running request
(`slot_tokens`), and feed the next step from there: the host never waits for a token before it can dispatch.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from chameleon_jax.models.llama import Llama, logits
from chameleon_jax.models.ops import INSIDE
from chameleon_jax.models.ops.adapter_vectors import resolve_vectors, scale_and_shift
from chameleon_jax.models.ops.batched_lora import batched_lora
from chameleon_jax.models.ops.batched_lora.plan import LoraTargets, resolve
from chameleon_jax.models.ops.paged_attention import paged_attention, write_kv
from chameleon_jax.models.ops.sampling import Sampled, SamplingMode, sample, sample_adjusted, score
from chameleon_jax.models.ops.write_pages import write_pages
from chameleon_jax.models.page_layout import PageLayout
from chameleon_jax.models.runtime.buckets import FROM_SLOT, Program, StepBuckets

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from chameleon_jax.models.ops.shapes import Block, Inputs, KeyValues, Outputs, PageIds, Pool, Pools, SlotTokens, TokenCounts


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
