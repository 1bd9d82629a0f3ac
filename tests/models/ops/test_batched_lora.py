"""Comparison of every backend with plain NumPy on unpacked weights, and promises of the plan."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.kernels.cases import GROUPS, adapter_ranks
from chameleon_jax.memory.adapters import MAX_RANK
from chameleon_jax.models.adapters import packing
from chameleon_jax.models.adapters.weights import AdapterWeights
from chameleon_jax.models.config import ALL_TARGETS, PRESETS, TARGETS, VOCABULARY_TARGETS
from chameleon_jax.models.ops.batched_lora import BACKENDS, triton
from chameleon_jax.models.ops.batched_lora.plan import BLOCK_ROWS, NO_TOKEN, plan_batch, resolve
from chameleon_jax.models.page_layout import PageLayout, PlacedAdapter
from tests.properties import examples

CONFIG = dataclasses.replace(PRESETS["tiny"], num_layers=1)
LAYOUT = PageLayout.for_model(CONFIG)
MAX_PAGES = LAYOUT.place({t: 256 for t in TARGETS}).num_pages


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter(PlacedAdapter):
    weights: AdapterWeights


def make_pool(ranks_of: list[dict[str, int]], seed: int = 0, num_pages: int | None = None) -> tuple[jnp.ndarray, list[Adapter]]:
    """Make adapters on scattered pages of a pool whose other pages hold NaN.

    The pool has `num_pages` pages, or as many as the adapters need.
    """
    rng = np.random.default_rng(seed)
    adapters, blocks = [], []
    for ranks in ranks_of:
        tensors = {}
        for target, rank in ranks.items():
            d_in, d_out = CONFIG.target_shape(target)
            tensors[0, target] = (
                rng.standard_normal((rank, d_in)).astype(np.float32) / 8,
                rng.standard_normal((d_out, rank)).astype(np.float32) / 8,
            )
        weights = AdapterWeights(tensors)
        blocks.append(packing.pack_on_host(weights, LAYOUT, np.dtype(np.float32))[0])
        adapters.append(Adapter(LAYOUT.place(weights.ranks), [], weights))
    free = rng.permutation(np.arange(1, num_pages or 1 + sum(map(len, blocks)))).tolist()
    pool = np.full((len(free) + 1, LAYOUT.page_elems), np.nan, np.float32)
    for adapter, block in zip(adapters, blocks):
        for page in block:
            number = free.pop()
            adapter.pages.append(number)  # type: ignore[attr-defined]
            pool[number] = page
    return jnp.array(pool), adapters


PLANNED = make_pool([{"q_proj": 3, "down_proj": 33}, dict.fromkeys(TARGETS, 8), {"v_proj": 70}, dict.fromkeys(TARGETS, 32)])
"""Adapters of which batches are planned."""


@functools.cache
def compiled(backend: str):
    """Compile the op for several groups of targets at once, with the GPU's kernels in interpret mode."""
    op = functools.partial(BACKENDS[backend], interpret=True) if backend == "triton" else BACKENDS[backend]

    def adapt(ys, xs, pool, targets, groups):
        return [op(y, x, pool, targets, names) for y, x, names in zip(ys, xs, groups)]

    return jax.jit(adapt, static_argnums=4)


compiled_resolve = jax.jit(resolve, static_argnums=(1, 2))  # op by op it would be some 30 programs a shape


def check(
    backend: str,
    pool,
    adapters,
    tokens: int,
    run_tokens=None,
    *,
    begin: int = 0,
    runs: int | None = None,
    batch: int | None = None,
    window: int = 8,
    max_rank: int = 256,
    groups=GROUPS,
) -> None:
    """Check a plan for `tokens` of the `batch` tokens, whose runs begin at `begin`."""
    batch, run_tokens = batch or tokens, run_tokens or [1] * len(adapters)
    plan = plan_batch(
        adapters,
        run_tokens,
        begin,
        tokens=tokens,
        runs=runs or tokens,
        window_tokens=window,
        max_rank=max_rank,
        max_pages=LAYOUT.place({t: max_rank for t in ALL_TARGETS}).num_pages,
        num_targets=len(TARGETS if groups is GROUPS else ALL_TARGETS),
    )
    targets = compiled_resolve(plan, LAYOUT, batch)
    rng = np.random.default_rng(1)
    xs, ys, expectations = [], [], []
    for names in groups:
        x = rng.standard_normal((batch, CONFIG.target_shape(names[0])[0])).astype(np.float32)
        outputs = []
        for target in names:
            y = rng.standard_normal((batch, CONFIG.target_shape(target)[1])).astype(np.float32)
            expected = y.copy()
            first = begin
            for adapter, count in zip(adapters, run_tokens):
                if adapter is not None and (0, target) in adapter.weights.tensors:
                    a, b = adapter.weights.tensors[0, target]
                    rows = slice(first, first + count)
                    expected[rows] += x[rows] @ a.T @ b.T
                first += count
            outputs.append((y, expected))
        y, expected = (np.concatenate(side, axis=1) for side in zip(*outputs))
        xs.append(x)
        ys.append(y)
        expectations.append(expected)
    for names, got, expected in zip(groups, compiled(backend)(ys, xs, pool, targets, groups), expectations, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=str(names))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens,window", [(1, 1), (16, 8), (12, 8), (20, 16)])
def test_mixed_ranks_targets_and_base_rows(backend, tokens, window):
    pool, adapters = make_pool(adapter_ranks((3, 8, 64, 256)))
    rng = np.random.default_rng(tokens)
    picks = rng.integers(0, len(adapters) + 1, tokens - tokens // 4)
    chosen = [adapters[i] if i < len(adapters) else None for i in sorted(picks)]
    if backend == "reference":
        pool = jnp.nan_to_num(pool)  # only the other backends promise to ignore the content of foreign pages
    check(backend, pool, chosen, tokens, window=window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "tokens,run_tokens,begin,window",
    [
        (256, [70, 1, 60, 33, 80], 0, 128),  # runs that windows cut, and one longer than what is left of its window
        (192, [130, 40], 0, 128),  # the last window slides back
        (160, [20, 90, 3], 9, 128),  # behind nine rows of another plan
        (32, [5, 9], 3, 32),
        (300, [290], 4, 128),  # one run in every window
    ],
)
def test_prompts_of_any_length(backend, tokens, run_tokens, begin, window):
    pool, adapters = make_pool(adapter_ranks((3, 8, 64)))
    if backend == "reference":
        pool = jnp.nan_to_num(pool)
    chosen = [adapters[3], None, adapters[1], adapters[0], adapters[3]][: len(run_tokens)]
    check(backend, pool, chosen, tokens, run_tokens, begin=begin, runs=8, window=window, max_rank=64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_for_the_first_tokens_leaves_the_others(backend):
    pool, adapters = make_pool(adapter_ranks((3, 64)))
    if backend == "reference":
        pool = jnp.nan_to_num(pool)
    check(backend, pool, [adapters[0], adapters[2], None, adapters[1]], 10, batch=96, max_rank=64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run_tokens", [1, 32])
def test_the_largest_ranks(backend, run_tokens):
    pool, adapters = make_pool([{t: r for t in TARGETS} for r in (384, 8, MAX_RANK)])
    if backend == "reference":
        pool = jnp.nan_to_num(pool)
    chosen, window = [adapters[0], None, *adapters], min(128, 8 * run_tokens)
    check(
        backend, pool, chosen, 5 * run_tokens, [run_tokens] * 5, runs=5, window=min(window, 5 * run_tokens), max_rank=MAX_RANK
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run_tokens", [1, 32])
def test_matrices_of_the_vocabulary(backend, run_tokens):
    ranks: list[dict[str, int]] = [{"q_proj": 9, "lm_head": 40}, {"embed_tokens": 5, "lm_head": 3}, {"embed_tokens": 64}]
    pool, adapters = make_pool(ranks)
    if backend == "reference":
        pool = jnp.nan_to_num(pool)
    groups = tuple((target,) for target in VOCABULARY_TARGETS)
    chosen = [adapters[0], None, *adapters]
    check(backend, pool, chosen, 6 * run_tokens, [run_tokens] * 5, runs=6, window=min(6 * run_tokens, 128), groups=groups)


@pytest.mark.parametrize("run_tokens", [1, 32])
def test_long_rows_are_split(monkeypatch, run_tokens):
    monkeypatch.setattr(triton, "SPLIT_ELEMS", 24)
    compiled.cache_clear()  # traced programs have read the constant
    pool, adapters = make_pool([{t: r for t in TARGETS} for r in (3, 40)])
    tokens = 4 * run_tokens
    check("triton", pool, [adapters[0], None, *adapters], tokens, [run_tokens] * 4, window=min(tokens, 128))
    compiled.cache_clear()


@pytest.mark.parametrize("backend", ["blocked", "triton"])
@examples(25)
@given(
    ranks=st.lists(st.dictionaries(st.sampled_from(TARGETS), st.integers(1, 70), min_size=1), min_size=1, max_size=4),
    picks=st.lists(st.integers(0, 4), min_size=1, max_size=8),
)
def test_any_batch(backend, ranks, picks):
    # of one size, so that one program serves all examples
    pool, adapters = make_pool(ranks, num_pages=1 + 4 * LAYOUT.place(dict.fromkeys(TARGETS, 70)).num_pages)
    check(backend, pool, [adapters[i] if i < len(adapters) else None for i in picks], 8)


@examples(100)
@given(
    runs=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60)), max_size=6),
    begin=st.integers(0, 20),
    window=st.sampled_from([8, 16, 64, 128]),
)
def test_a_plan_lists_each_adapter_once_in_each_window_that_has_it(runs, begin, window):
    _, adapters = PLANNED
    tokens, chosen = 400, [adapters[i] if i < len(adapters) else None for i, _ in runs]
    counts = [count for _, count in runs]
    plan = plan_batch(
        chosen, counts, begin, tokens=tokens, runs=8, window_tokens=window, max_rank=70, max_pages=MAX_PAGES, num_targets=7
    )
    owners: list[Adapter | None] = [None] * tokens
    owners[begin : begin + sum(counts)] = [a for a, count in zip(chosen, counts) for _ in range(count)]
    numbers = list(dict.fromkeys(a for a in chosen if a is not None))
    inside = range(begin, begin + sum(counts))
    for token, owner in enumerate(owners):
        expected = (-1 if owner is None else numbers.index(owner)) if token in inside else NO_TOKEN
        assert plan.token_adapter[token] == expected
    for t, target in enumerate(TARGETS):
        for w in range(-(-tokens // window)):
            first, last = plan.first_blocks[t, w] * BLOCK_ROWS, plan.first_blocks[t, w + 1] * BLOCK_ROWS
            listed = [code for code in plan.rank_rows[t, first:last].tolist() if code >= 0]
            present = dict.fromkeys(a for a in owners[w * window : (w + 1) * window] if a is not None)
            wanted = [numbers.index(a) * MAX_RANK + row for a in present for row in range(a.weights.ranks.get(target, 0))]
            assert sorted(listed) == sorted(wanted)
            assert last - first == -(-len(wanted) // BLOCK_ROWS) * BLOCK_ROWS


def test_work_is_true_ranks_of_the_adapters_that_are_there():
    _, adapters = make_pool([{"q_proj": 8}, {"q_proj": 200, "v_proj": 200}])
    sizes = {"tokens": 8, "runs": 8, "window_tokens": 8, "max_rank": 256, "max_pages": MAX_PAGES}
    plan = plan_batch([adapters[0]] * 4, **sizes)
    assert (plan.rank_rows >= 0).sum() == 8
    assert plan.first_blocks[:, -1].tolist() == [1, 0, 0, 0, 0, 0, 0]
    plan = plan_batch(adapters, **sizes)
    assert (plan.rank_rows >= 0).sum(axis=1).tolist() == [208, 0, 200, 0, 0, 0, 0]
    assert plan.first_blocks[0, -1] == -(-208 // BLOCK_ROWS)


@pytest.mark.parametrize("rank", [256, 40, 32, 8, 1])
def test_the_worst_case_fits(rank):
    _, adapters = make_pool([{t: rank for t in TARGETS}] * 8)
    plan = plan_batch(adapters, tokens=8, runs=8, window_tokens=8, max_rank=rank, max_pages=MAX_PAGES)
    assert (plan.rank_rows >= 0).sum() == 7 * 8 * rank
    # every run in as many windows as it can be in
    plan = plan_batch(adapters, [49] * 8, 1, tokens=400, runs=8, window_tokens=64, max_rank=rank, max_pages=MAX_PAGES)
    assert (plan.rank_rows >= 0).sum() == 7 * 14 * rank
    used, room = plan.first_blocks[0, -1] * BLOCK_ROWS, plan.rank_rows.shape[1]
    assert used <= room < used + 7 * BLOCK_ROWS  # there are seven windows


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_a_program_for_attention_alone_has_nothing_of_the_others(backend):
    pool, adapters = make_pool([{t: r for t in TARGETS[:4]} for r in (3, 40)])
    sizes = {"tokens": 4, "runs": 4, "window_tokens": 4, "max_rank": 64, "max_pages": MAX_PAGES}
    plan = plan_batch(adapters, **sizes, num_targets=4)
    whole = plan_batch(adapters, **sizes)
    np.testing.assert_array_equal(plan.rank_rows, whole.rank_rows[:4])
    targets = compiled_resolve(plan, LAYOUT, 4)
    assert [targets.adapts(names) for names in GROUPS] == [True, True, False, False]
    x = jnp.ones((4, CONFIG.hidden_size))
    y = jnp.zeros((4, sum(CONFIG.target_shape(t)[1] for t in GROUPS[0])))
    (got,), (expected,) = (compiled(backend)([y], [x], pool, compiled_resolve(p, LAYOUT, 4), GROUPS[:1]) for p in (plan, whole))
    np.testing.assert_array_equal(got, expected)
    assert np.abs(got).sum() > 0


@pytest.mark.parametrize(
    "tokens,window,batch",
    [(1, 1, 1), (320, 128, 320), (20, 16, 20), (24, 24, 24), (300, 300, 300), (192, 128, 192), (8, 8, 700)],
)
def test_padding_reaches_as_far_as_a_kernel_reads(tokens, window, batch):
    plan = plan_batch([], tokens=tokens, runs=1, window_tokens=window, max_rank=8, max_pages=MAX_PAGES)
    targets = compiled_resolve(plan, LAYOUT, batch)
    windows = targets.first_blocks.shape[0] - 1
    end = (windows - 1) * targets.window_tokens + triton._tile(targets.window_tokens)
    assert targets.token_adapter.shape[0] >= max(end, batch)
    assert (np.asarray(targets.token_adapter) == NO_TOKEN).all()
