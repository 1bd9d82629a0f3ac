from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.models.adapters.weights import AdapterWeights
from chameleon_jax.models.config import PRESETS, TARGETS
from chameleon_jax.models.page_layout import PageLayout
from tests.properties import examples

RANKS = st.dictionaries(st.sampled_from(TARGETS), st.integers(1, 256), min_size=1)


@examples(60)
@given(preset=st.sampled_from(sorted(PRESETS)), ranks=RANKS)
def test_rows_do_not_overlap_straddle_or_leave_the_adapter(preset, ranks):
    layout = PageLayout.for_model(PRESETS[preset])
    placement = layout.place(ranks)
    spans = []
    for target, rank in ranks.items():
        for start, width in zip(placement.starts[target], layout.config.target_shape(target)):
            for row in range(rank):
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


def test_pack_puts_rows_where_addresses_say():
    layout = PageLayout.for_model(PRESETS["tiny"])
    rng = np.random.default_rng(0)
    tensors = {}
    for layer, target, rank in ((0, "q_proj", 3), (1, "q_proj", 2), (1, "down_proj", 40)):
        d_in, d_out = layout.config.target_shape(target)
        tensors[layer, target] = (rng.standard_normal((rank, d_in)), rng.standard_normal((d_out, rank)))
    block = layout.pack(AdapterWeights(tensors), np.dtype(np.float64))
    placement = layout.place({"q_proj": 3, "down_proj": 40})
    assert block.shape == (2, placement.num_pages, layout.page_elems)
    for (layer, target), (a, b) in tensors.items():
        for start, rows in zip(placement.starts[target], (a, b.T)):
            for i, row in enumerate(rows):
                page, offset = layout.row_address(start, i, row.shape[0])
                np.testing.assert_array_equal(block[layer, page, offset : offset + row.shape[0]], row)
    page, offset = layout.row_address(placement.starts["q_proj"][0], 2, 64)
    assert not block[1, page, offset : offset + 64].any()  # layer 1 has rank 2 only


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
