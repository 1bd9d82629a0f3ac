from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.models.adapters import packing
from chameleon_jax.models.adapters.weights import AdapterWeights, ReplacedRows, cut_vocabulary
from chameleon_jax.models.config import ALL_TARGETS, PRESETS, TARGETS
from chameleon_jax.models.page_layout import PageLayout
from tests.properties import examples

RANKS = st.dictionaries(st.sampled_from(ALL_TARGETS), st.integers(1, 256), min_size=1)


@examples(60)
@given(preset=st.sampled_from(sorted(PRESETS)), ranks=RANKS, vectors=st.sets(st.sampled_from(TARGETS)))
def test_rows_do_not_overlap_straddle_or_leave_the_adapter(preset, ranks, vectors):
    layout = PageLayout.for_model(PRESETS[preset], extras=True)
    placement = layout.place(ranks, vectors & ranks.keys())
    assert placement.vectors == vectors & ranks.keys()
    spans = []
    for target, rank in ranks.items():
        for start, (rows, width) in zip(placement.starts[target], layout.runs(target, rank, target in vectors)):
            for row in range(rows):
                page, offset = layout.row_address(start, row, width)
                assert 0 <= page < placement.num_pages
                assert offset + width <= layout.page_elems
                spans.append((page * layout.page_elems + offset, width))
    spans.sort()
    assert all(at + width <= following for (at, width), (following, _) in zip(spans, spans[1:]))


def test_pages_of_llama_7b_take_the_bytes_of_the_paper():
    layout = PageLayout.for_model(PRESETS["llama-7b"])
    assert layout.page_bytes(2) // layout.page_tokens == 512 * 1024  # 0.5 MiB a token
    for rank, mebibytes in ((8, 16), (16, 32), (32, 64), (64, 128), (128, 256)):
        pages = layout.place({t: rank for t in ("q_proj", "k_proj", "v_proj", "o_proj")}).num_pages
        assert pages * layout.page_bytes(2) == mebibytes * 2**20


def test_pages_grow_where_the_widest_row_would_not_fit():
    config = dataclasses.replace(PRESETS["tiny"], intermediate_size=5000)
    assert PageLayout.for_model(config).page_elems >= 5000


def test_a_large_vocabulary_makes_pages_grow_with_extras_alone():
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=32_000)
    assert PageLayout.for_model(config).page_tokens == 16
    assert PageLayout.for_model(config, extras=True).page_elems >= 16_000


def test_pack_puts_rows_where_addresses_say():
    layout = PageLayout.for_model(PRESETS["tiny"])
    rng = np.random.default_rng(0)
    tensors = {}
    for layer, target, rank in ((0, "q_proj", 3), (1, "q_proj", 2), (1, "down_proj", 40)):
        d_in, d_out = layout.config.target_shape(target)
        tensors[layer, target] = (rng.standard_normal((rank, d_in)), rng.standard_normal((d_out, rank)))
    block = packing.pack_on_host(AdapterWeights(tensors), layout, np.dtype(np.float64))
    placement = layout.place({"q_proj": 3, "down_proj": 40})
    assert block.shape == (2, placement.num_pages, layout.page_elems)
    for (layer, target), (a, b) in tensors.items():
        for start, rows in zip(placement.starts[target], (a, b.T)):
            for i, row in enumerate(rows):
                page, offset = layout.row_address(start, i, row.shape[0])
                np.testing.assert_array_equal(block[layer, page, offset : offset + row.shape[0]], row)
    page, offset = layout.row_address(placement.starts["q_proj"][0], 2, 64)
    assert not block[1, page, offset : offset + 64].any()  # layer 1 has rank 2 only


def test_pack_puts_vectors_behind_the_matrices():
    layout = PageLayout.for_model(PRESETS["tiny"])
    pair = (np.ones((2, 64)), np.ones((64, 2)))
    scales, shifts = {(0, "o_proj"): np.arange(64.0)}, {(1, "o_proj"): -np.arange(64.0)}
    weights = AdapterWeights({(0, "o_proj"): pair, (1, "o_proj"): pair, (0, "q_proj"): pair}, scales=scales, shifts=shifts)
    block = packing.pack_on_host(weights, layout, np.dtype(np.float64))
    placement = layout.place(weights.ranks, weights.vectors)
    assert placement.vectors == {"o_proj"} and placement.num_targets == len(ALL_TARGETS)
    for layer, expected in enumerate(([np.arange(64.0), np.zeros(64)], [np.ones(64), -np.arange(64.0)])):
        for row, vector in enumerate([expected[0] - 1, expected[1]]):
            page, offset = layout.row_address(placement.starts["o_proj"][2], row, 64)
            np.testing.assert_array_equal(block[layer, page, offset : offset + 64], vector)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("vocab_size", [512, 500, 33])
def test_the_parts_of_a_cut_matrix_have_its_update(target, vocab_size):
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=vocab_size, num_layers=3)
    rng = np.random.default_rng(0)
    d_in, d_out = (vocab_size, 64) if target == "embed_tokens" else (64, vocab_size)
    a, b = rng.standard_normal((4, d_in)), rng.standard_normal((d_out, 4))
    parts = cut_vocabulary(target, a, b, config)
    AdapterWeights(parts).check(config)
    updates = [b @ a for a, b in (parts[layer, target] for layer in range(3))]
    joined = (
        np.concatenate(updates, axis=1)[:, :vocab_size] if target == "embed_tokens" else np.concatenate(updates)[:vocab_size]
    )
    np.testing.assert_array_equal(joined, b @ a)
    with pytest.raises(ValueError, match=rf"{target}: A is .*the base model needs \[r, {d_in}\]"):
        cut_vocabulary(target, a[:, :-1], b, config)


def test_weights_that_do_not_fit_are_refused():
    config = PRESETS["tiny"]
    good = (np.zeros((2, 64)), np.zeros((64, 2)))
    for tensors, message in (
        ({}, "adapts no matrix"),
        ({(0, "embed"): good}, "target is 'embed'"),
        ({(2, "q_proj"): good}, "layer is 2"),
        ({(0, "down_proj"): good}, r"needs \[r, 128\]"),
        ({(0, "q_proj"): (np.full((2, 64), np.nan), np.zeros((64, 2)))}, "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            AdapterWeights(tensors).check(config)


def test_vectors_and_rows_that_do_not_fit_are_refused():
    config = PRESETS["tiny"]
    good = {(0, "q_proj"): (np.zeros((2, 64)), np.zeros((64, 2)))}
    for parts, message in (
        (dict(scales={(0, "q_proj"): np.ones(63)}), r"q_proj: scales: the shape is \[63\]; allowed: \[64\]"),
        (dict(magnitudes={(0, "q_proj"): np.full(64, np.inf)}), "q_proj: magnitudes: the values hold NaN or infinity"),
        (dict(shifts={(1, "q_proj"): np.ones(64)}), "layers.1.q_proj: shifts: there is no LoRA"),
        (dict(replaced={"lm_head": ReplacedRows((1, 1), np.zeros((2, 64)))}), "lm_head: trained tokens are .*each once"),
        (dict(replaced={"lm_head": ReplacedRows((512,), np.zeros((1, 64)))}), "allowed: 0 to 511"),
        (dict(replaced={"lm_head": ReplacedRows(None, np.zeros((2, 64)))}), r"its rows is \[2, 64\]; allowed: \[512, 64\]"),
        (dict(replaced={"lm_head": ReplacedRows((1,), np.full((1, 64), np.nan))}), "lm_head: its rows hold NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            AdapterWeights(good, **parts).check(config)
