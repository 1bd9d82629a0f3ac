"""One forward program for a step's rows that decode and its prompts: tokens do not depend on what a step has beside them."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.models.adapters import packing
from chameleon_jax.models.adapters.weights import AdapterWeights
from chameleon_jax.models.config import ALL_TARGETS, PRESETS, TARGETS
from chameleon_jax.models.llama import random_model
from chameleon_jax.models.page_layout import PageLayout, PlacedAdapter
from chameleon_jax.models.runtime.buckets import StepBuckets
from chameleon_jax.models.runtime.model_runner import ModelRunner
from chameleon_jax.models.runtime.step_inputs import SamplingRow, SequenceChunk
from tests.properties import examples

CONFIG = dataclasses.replace(PRESETS["tiny"], num_layers=2)
LAYOUT = PageLayout.for_model(CONFIG)
DTYPE = jnp.dtype("float32")
NEW_TOKENS = 4
PROMPTS = [list(range(3, 48)), [60, 61, 62], list(range(100, 117)), [7]]
WIDTH = LAYOUT.pages_for_tokens(max(map(len, PROMPTS)) + NEW_TOKENS)


def draw(rng: np.random.Generator, ranks: dict[str, int], vectors: bool = False) -> AdapterWeights:
    tensors = {}
    for layer in range(CONFIG.num_layers):
        for target, rank in ranks.items():
            d_in, d_out = CONFIG.target_shape(target)
            a, b = rng.standard_normal((rank, d_in)) / 8, rng.standard_normal((d_out, rank)) / 8
            tensors[layer, target] = (a.astype(np.float32), b.astype(np.float32))
    if not vectors:
        return AdapterWeights(tensors)
    sizes = {target: CONFIG.target_shape(target)[1] for target in TARGETS}
    scales = {(0, target): 1 + rng.standard_normal(sizes[target]).astype(np.float32) / 8 for target in TARGETS[:4]}
    return AdapterWeights(tensors, scales=scales, shifts={(1, "up_proj"): np.ones(sizes["up_proj"], np.float32)})


class Sequences:
    """Sequences over one runner, the first with an adapter of all kinds, the last without one.

    Steps without the first run programs for adapters of the layers' matrices alone. They draw at random or greedily in turn.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        weights = [
            draw(rng, dict.fromkeys(ALL_TARGETS, 5), vectors=True),
            draw(rng, {"q_proj": 40, "down_proj": 3}),
            draw(rng, {"o_proj": 8}),
        ]
        placements = [LAYOUT.place(w.ranks, w.vectors) for w in weights]
        buckets = StepBuckets(
            max_num_seqs=4,
            max_prefill_tokens=64,
            table_width=WIDTH,
            max_rank=40,
            max_adapter_pages=max(p.num_pages for p in placements),
            extras=True,
        )
        held = sum(p.num_pages for p in placements)
        self.runner = ModelRunner(
            random_model(CONFIG, DTYPE), LAYOUT, buckets, 1 + held + WIDTH * 4, DTYPE, compile_programs="lazy"
        )
        pages = iter((1 + rng.permutation(held + WIDTH * 4)).tolist())
        self._written: list[tuple[np.ndarray, list[int]]] = []
        self.adapters: list[PlacedAdapter | None] = []
        for w, placement in zip(weights, placements):
            mine = [next(pages) for _ in range(placement.num_pages)]
            self.adapters.append(PlacedAdapter(placement, tuple(mine)))
            self._written.append((packing.pack_on_host(w, LAYOUT, np.dtype(np.float32)), mine))
        self.adapters.append(None)
        self.tables = [[next(pages) for _ in range(WIDTH)] for _ in PROMPTS]

    def begin(self) -> None:
        """Empty the pool but for NaN in its trash page, and load the adapters."""
        self.runner.reset()
        layers, elems = CONFIG.num_layers, LAYOUT.page_elems
        self.runner.write_adapter(self.runner.put(np.full((layers, 1, elems), np.nan, np.float32)), [0])
        for block, pages in self._written:
            for i, page in enumerate(pages):
                self.runner.write_adapter(self.runner.put(block[:, i : i + 1]), [page])

    def chunk(self, i: int, computed: int, tokens: int) -> tuple[SequenceChunk, SamplingRow | None]:
        """Make a sequence's next chunk, of a prompt if it is not all computed, and the parameters of the token behind it."""
        prompt = PROMPTS[i]
        known = prompt[computed : computed + tokens] if computed < len(prompt) else None
        end = computed + (1 if known is None else len(known))
        row = SamplingRow(i, end, 11 * i, 0.9 * (i % 2), 0, 1.0, 0.0, (), logprobs=False)
        return SequenceChunk(known, computed, i, tuple(self.tables[i]), self.adapters[i]), row if end >= len(prompt) else None

    def step(self, parts: dict[int, tuple[int, int]]) -> dict[int, int]:
        """Run a step of some sequences, each with its computed and its new tokens; return the tokens that they draw."""
        made = {i: self.chunk(i, *part) for i, part in parts.items()}
        order = sorted(made, key=lambda i: made[i][0].tokens is not None)
        rows = {n: made[i][1] for n, i in enumerate(order) if made[i][1] is not None}
        sampled = self.runner.run([made[i][0] for i in order], rows).sampled
        return {} if sampled is None else {order[n]: int(token) for n, token in zip(rows, sampled.tokens)}

    def alone(self, i: int) -> list[int]:
        """Compute a sequence by itself, its prompt in one step."""
        self.begin()
        length = len(PROMPTS[i])
        drawn = [self.step({i: (0, length)})[i]]
        return drawn + [self.step({i: (length + n, 1)})[i] for n in range(NEW_TOKENS - 1)]


def test_tokens_do_not_depend_on_the_rest_of_a_step():
    sequences = Sequences()
    expected = [sequences.alone(i) for i in range(len(PROMPTS))]
    kinds = set()
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)

    @examples(15)
    @given(data=st.data())
    def any_order(data: st.DataObject) -> None:
        sequences.begin()
        computed, drawn = dict.fromkeys(range(len(PROMPTS)), 0), {i: [] for i in range(len(PROMPTS))}
        while left := [i for i in computed if len(drawn[i]) < NEW_TOKENS]:
            parts, room = {}, 64
            for i in data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True)):
                waits = len(PROMPTS[i]) - computed[i]
                tokens = min(room, data.draw(st.integers(1, waits))) if waits > 0 else 1
                if tokens:
                    parts[i] = (computed[i], tokens)
                    room -= tokens if waits > 0 else 0
            kinds.add(frozenset(computed[i] < len(PROMPTS[i]) for i in parts))
            for i, token in sequences.step(parts).items():
                drawn[i].append(token)
            for i, (_, tokens) in parts.items():
                computed[i] += tokens
        assert [drawn[i] for i in range(len(PROMPTS))] == expected

    any_order()
    assert kinds >= {frozenset([False]), frozenset([True]), frozenset([False, True])}  # decodes, prompts, and both
