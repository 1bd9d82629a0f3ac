"""Programs that run on the device, one for each shape bucket.

`forward` runs a step's tokens through the model, and `sample_step` chooses tokens from its last hidden states. They are apart
so that their variants add up instead of multiplying. Sampled tokens stay on the device, one place for each running request
(`slot_tokens`), and feed the next step from there: the host never waits for a token before it can dispatch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
from chameleon_jax.models.runtime.buckets import FROM_SLOT, TILE_COLUMNS, Program, StepBuckets, StepInputs

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from chameleon_jax.models.ops.shapes import Block, Inputs, KeyValues, Outputs, PageIds, Pool, Pools, SlotTokens, TokenCounts


class Forwarded(NamedTuple):
    """Results of a step's forward program.

    Attributes:
        hidden: Hidden state of the token behind which each sampling row samples.
        sampling_rows: Sampling rows that came with the step.
        pages: The pool with the tokens' KV in it.
        states: In a program with prompts, the hidden states of all tokens for `score_prompts`, as many rows as the largest step
            has tokens, so that one program scores steps of every size.
        logit_updates: Updates of adapters to the logits of the first sampling rows, float32, where the program has extras.
    """

    hidden: Float[Array, "sequences hidden"]
    sampling_rows: Int[Array, "sequences columns"]
    pages: Pools
    states: Float[Array, "most_tokens hidden"] | None
    logit_updates: Float[Array, "rows vocab"] | None


class Places(NamedTuple):
    """Places of a step's tokens.

    Attributes:
        positions: Position of each token in its sequence.
        page_ids: Page of each token's KV; past the pool's end for padding.
        page_slots: Place of the token in its page.
    """

    positions: Int[Array, " tokens"]
    page_ids: Int[Array, " tokens"]
    page_slots: Int[Array, " tokens"]


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
    """Run a step through the model, the rows that decode and the prompts together: weights are read once.

    Attention and adapters' updates differ by kind: the first rows decode, and prompts are taken in tiles.

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
    num_tokens, rows, num_tiles, _ = program
    slots = inputs.tiles[:rows, 3]
    placed = _place(inputs, program, buckets.prefill_tile, layout.page_tokens, pages[0].shape[0])
    tokens = inputs.tokens
    if rows:
        drawn = slot_tokens.at[slots].get(**INSIDE)
        decoding = jnp.where(tokens[:rows] == FROM_SLOT, drawn, tokens[:rows])
        tokens = jnp.concatenate([decoding, tokens[rows:]])
    kinds_of_tiles = [(slice(rows), 1)] * bool(rows) + [(slice(rows, None), buckets.prefill_tile)] * bool(num_tiles)

    def attend(
        q: Float[Array, "tokens heads head_dim"], k: KeyValues, v: KeyValues, pages: Pool
    ) -> tuple[Float[Array, "tokens heads head_dim"], Pool]:
        pages = write_kv(pages, k, v, placed.page_ids, placed.page_slots)
        for kind, tile_tokens in kinds_of_tiles:
            tiles = inputs.tiles[kind]
            first, start, count = (tiles[:, i] for i in range(3))
            sizes = {"tile_tokens": tile_tokens, "num_kv_heads": layout.config.num_kv_heads}
            q = paged_attention(q, pages, tiles[:, TILE_COLUMNS:], first, start, count, **sizes, backend=backend)
        return q, pages

    plans = [plan for plan in (inputs.decode_lora, inputs.prompt_lora) if plan is not None]
    adapt = adapt_embedding = None
    if plans:
        kinds = [resolve(plan, layout, num_tokens) for plan in plans]
        vectors = [resolve_vectors(plan, layout, num_tokens) for plan in plans] if program.extras else []

        def adapt(names: tuple[str, ...], y: Outputs, x: Inputs, pages: Pool) -> Outputs:
            with jax.named_scope("lora"):
                for found in vectors:
                    y = scale_and_shift(y, pages, found, names)
                for targets in kinds:
                    if targets.adapts(names):
                        y = batched_lora(y, x, pages, targets, names, backend=backend)
            return y

        if program.extras:
            adapt_embedding = functools.partial(_adapt_embedding, pages=pages, kinds=kinds, layout=layout, backend=backend)

    hidden, pages = model(tokens, placed.positions, pages, attend, adapt, adapt_embedding)
    states = updates = None
    if num_tiles:
        states = jnp.pad(hidden, ((0, buckets.most_tokens - num_tokens), (0, 0)))
    hidden = hidden.at[inputs.sampled].get(**INSIDE)
    if program.extras:
        updated = buckets.sampled_rows(program)
        plan = inputs.sampled_lora or inputs.decode_lora
        assert plan is not None
        updates = _logit_updates(hidden[:updated], pages, resolve(plan, layout, updated), layout, backend)
    return Forwarded(hidden, inputs.sampling_rows, pages, states, updates)


def _place(inputs: StepInputs, program: Program, tile: int, page_tokens: int, num_pages: int) -> Places:
    """Find the places of a step's tokens."""
    rows, starts, counts = program.rows, inputs.tiles[:, 1], inputs.tiles[:, 2]
    if inputs.places is None:
        owner, within, valid = jnp.arange(rows), jnp.zeros(rows, jnp.int32), counts > 0
    else:
        places = jnp.maximum(inputs.places, 0)
        behind = jnp.maximum(places - rows, 0)
        owner = jnp.where(places < rows, places, rows + jax.lax.div(behind, tile))
        within, valid = jnp.where(places < rows, 0, jax.lax.rem(behind, tile)), inputs.places >= 0
    positions = jnp.where(valid, starts.at[owner].get(**INSIDE) + within, 0)
    page_ids = inputs.tiles.at[owner, TILE_COLUMNS + jax.lax.div(positions, page_tokens)].get(**INSIDE)
    return Places(positions, jnp.where(valid, page_ids, num_pages), jax.lax.rem(positions, page_tokens))


def _adapt_embedding(
    x: Float[Array, "tokens hidden"],
    tokens: Int[Array, " tokens"],
    *,
    pages: Pools,
    kinds: Sequence[LoraTargets],
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
            for targets in kinds:
                x = batched_lora(x, one_hot, pool, targets, ("embed_tokens",), backend=backend)
    return x


def _logit_updates(
    hidden: Float[Array, "rows hidden"], pages: Pools, targets: LoraTargets, layout: PageLayout, backend: str
) -> Float[Array, "rows vocab"]:
    """Compute the adapters' updates to the logits, by their updates of the output matrix: a part for each layer."""
    config = layout.config
    nothing = jnp.zeros((len(hidden), config.vocab_cut), jnp.float32)
    with jax.named_scope("lora_head"):
        parts = [batched_lora(nothing, hidden, pool, targets, ("lm_head",), backend=backend) for pool in pages]
    return jnp.concatenate(parts, axis=1)[:, : config.vocab_size]


def sample_step(
    head: Float[Array, "vocab hidden"],
    hidden: Float[Array, "sequences hidden"],
    slot_tokens: SlotTokens,
    sampling_rows: Int[Array, "sequences columns"],
    *,
    rows: int,
    mode: SamplingMode,
    backend: str,
) -> tuple[Sampled, SlotTokens]:
    """Sample one token for each of the first rows and put it into its slot, where the next step looks for it.

    Args:
        head: Output matrix (`Llama.output_matrix`).
        hidden: Hidden states, as `forward` returns them.
        slot_tokens: Token last sampled for each slot; int32.
        sampling_rows: Packed parameters, as `forward` returns them.
        rows: Rows to sample.
        mode: Kind of sampling that the rows need together.
        backend: Backend of the device ops, one of `ops.BACKENDS`.
    """
    sampling_rows = sampling_rows[:rows]
    sampled = sample(logits(hidden[:rows], head), sampling_rows, mode, guesses=_guesses(backend))
    return sampled, slot_tokens.at[sampling_rows[:, 0]].set(sampled.tokens)


def sample_adjusted_step(
    head: Float[Array, "vocab hidden"],
    hidden: Float[Array, "sequences hidden"],
    slot_tokens: SlotTokens,
    counts: TokenCounts,
    sampling_rows: Int[Array, "sequences columns"],
    adjustments: Int[Array, "rows _"],
    logit_updates: Float[Array, "rows vocab"] | None = None,
    *,
    mode: SamplingMode,
    backend: str,
) -> tuple[Sampled, SlotTokens, TokenCounts]:
    """Sample as `sample_step` does, from logits that `adjustments` change; `sampling.sample_adjusted` says how.

    There are as many rows as adjustments. `logit_updates` are added to the logits first; `forward` returns them.
    """
    rows = len(adjustments)
    sampling_rows = sampling_rows[:rows]
    found = logits(hidden[:rows], head)
    if logit_updates is not None:
        found = found + logit_updates
    sampled, counts = sample_adjusted(found, sampling_rows, adjustments, counts, mode, _guesses(backend))
    return sampled, slot_tokens.at[sampling_rows[:, 0]].set(sampled.tokens), counts


def _guesses(backend: str) -> int:
    """Count the thresholds that sampling tries in one pass."""
    return 7 if backend == "triton" else 1


def score_prompts(
    head: Float[Array, "vocab hidden"], states: Float[Array, "most_tokens hidden"], packed: Int[Array, " packed"], *, tile: int
) -> Sampled:
    """Compute the log-probabilities of the tokens that follow some tokens of prompts.

    Args:
        head: Output matrix (`Llama.output_matrix`).
        states: Hidden states of a step's tokens, as `forward` returns them.
        packed: Number of runs of `tile` tokens to compute, those runs' numbers in a list as long as all of them, and the token
            behind each token; int32.
        tile: Tokens of a run.

    Returns:
        A row for each token; unspecified in runs that are not computed.
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
