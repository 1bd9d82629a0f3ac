"""Longest sequence of an engine: as set, or the model's limit within the page pool."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from chameleon_jax.config import EngineConfig
from chameleon_jax.models.config import PRESETS
from chameleon_jax.models.page_layout import PageLayout
from chameleon_jax.serving import compiled_model
from chameleon_jax.serving.engine import LLMEngine
from chameleon_jax.serving.max_model_len import LengthLimits

LIMITS = LengthLimits(wanted=None, model=8192, page_tokens=16, adapter_pages=100, on_host=False)


@pytest.mark.parametrize(
    ("changes", "num_pages", "tokens", "reason"),
    [
        ({}, 1000, 8192, "the model's limit"),
        ({}, 613, 8192, "the model's limit"),
        ({}, 612, 8176, "as much as the pool of 612 pages holds beside the largest adapter; the model's limit is 8192"),
        ({"adapter_pages": 0}, 101, 1600, "as much as the pool of 101 pages"),
        ({}, 151, 1200, "as much as the pool of 151 pages"),  # half of it: an adapter that takes more is unlikely
        ({}, 2, 16, "as much as"),
        ({"on_host": True}, 1000, 2048, "the most on a CPU unless it is set; the model's limit is 8192"),
        ({"on_host": True, "model": 512}, 1000, 512, "the model's limit"),
        ({"on_host": True}, 201, 1600, "as much as"),
        ({"wanted": 4096, "on_host": True}, 10, 4096, "as set"),
    ],
)
def test_choice(changes, num_pages, tokens, reason):
    chosen = dataclasses.replace(LIMITS, **changes).choose(num_pages)
    assert chosen.tokens == tokens and chosen.reason.startswith(reason)


def test_a_setting_above_the_models_limit_is_refused():
    with pytest.raises(ValueError, match="max_model_len is 8193; allowed: at most 8192, the model's limit"):
        dataclasses.replace(LIMITS, wanted=8193)


SIZES = dict(max_num_seqs=2, max_num_batched_tokens=64, max_lora_rank=8, load_format="dummy", compile_programs="lazy")


@pytest.mark.parametrize(("num_pages", "adapted", "expected"), [(31, False, 30 * 16), (31, True, 22 * 16), (None, True, 2048)])
def test_an_engine_says_what_it_chose(caplog, num_pages, adapted, expected):
    caplog.set_level(logging.INFO, "chameleon_jax")
    engine = LLMEngine("tiny", EngineConfig(num_pages=num_pages, enable_lora=adapted, **SIZES))
    engine.close()
    assert engine.max_model_len == engine.built.max_model_len == expected
    assert f"max_model_len is {expected}: " in caplog.text
    assert engine.runner.buckets.table_width == engine.layout.pages_for_tokens(expected)


def test_the_choice_is_lowered_to_the_pool_that_scratch_leaves(monkeypatch):
    """A device whose memory holds 40 pages without scratch, and 30 with it."""
    page_bytes = PageLayout.for_model(PRESETS["tiny"]).page_bytes(4)
    runner = compiled_model.ModelRunner
    monkeypatch.setattr(compiled_model, "HOST_POOL_BYTES", 40 * page_bytes)
    monkeypatch.setattr(
        compiled_model, "ModelRunner", lambda w, layout, buckets, n, *a, **k: runner(w, layout, buckets, 30, *a, **k)
    )
    engine = LLMEngine("tiny", EngineConfig(enable_lora=False, **SIZES))
    engine.close()
    assert engine.runner.buckets.table_width == 39 and engine.max_model_len == 29 * engine.layout.page_tokens
