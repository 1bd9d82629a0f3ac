from __future__ import annotations

import pytest

import chameleon_jax
from chameleon_jax.config import EngineConfig
from chameleon_jax.sampling_params import SamplingParams


@pytest.mark.parametrize(
    "field,value",
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", ["x" * 257]),
        ("stop_token_ids", range(9)),
        ("logprobs", 21),
        ("max_tokens", 8.0),
        ("seed", 1.5),
        ("logprobs", 2.0),
        ("temperature", "hot"),
        ("temperature", 10**400),
        ("temperature", float("inf")),
    ],
)
def test_sampling_params_name_what_is_wrong(field, value):
    with pytest.raises(ValueError, match=rf"{field} is .*; allowed: "):
        SamplingParams(**{field: value})


def test_errors_show_little_of_what_is_large():
    with pytest.raises(ValueError) as error:
        SamplingParams(stop=["x" * 1_000_000] * 16)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "field,value",
    [
        ("dtype", "int8"),
        ("load_format", "pickle"),
        ("max_model_len", 0),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 33),
        ("max_lora_rank", 513),
        ("lora_host_bytes", -1),
        ("num_pages", 1),
        ("gpu_memory_utilization", 0),
        ("page_tokens", 0),
        ("predicted_output_len", 0),
        ("ttft_slo", 0.0),
        ("ttft_slo", float("inf")),
        ("tbt_slo", float("nan")),
        ("system", "fastest"),
        ("max_queue_len", 0),
    ],
)
def test_engine_config_names_what_is_wrong(field, value):
    with pytest.raises(ValueError, match=rf"{field} is .*; allowed: "):
        EngineConfig(**{field: value})


def test_stop_may_be_one_string():
    assert SamplingParams(stop="x").stop == ("x",)


def test_public_names_are_there():
    for name in chameleon_jax.__all__:
        assert getattr(chameleon_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="AsyncLLm"):
        _ = chameleon_jax.AsyncLLm
