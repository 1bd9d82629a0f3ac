from __future__ import annotations

import pytest

from chameleon_jax.models.config import Llama3RopeScaling, LlamaConfig
from tests import reference_models as reference

HF = reference.CONFIGS["gqa"].to_hf()
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("name", reference.CONFIGS)
def test_round_trip(name):
    config = reference.CONFIGS[name]
    assert LlamaConfig.from_hf(config.to_hf()) == config


def test_defaults_are_those_of_transformers():
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = LlamaConfig.from_hf({field: HF[field] for field in needed})
    assert (config.num_kv_heads, config.head_dim, config.rope_theta, config.rms_norm_eps) == (4, 16, 10_000.0, 1e-6)
    assert (config.max_position_embeddings, config.tie_word_embeddings, config.eos_token_ids) == (2048, False, ())
    for field in needed:
        with pytest.raises(ValueError, match=f"config.json has no field {field}"):
            LlamaConfig.from_hf({f: v for f, v in HF.items() if f != field})


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": None}, {"rope_theta": 5e5}),
        ({"rope_scaling": {"type": "llama3", **LLAMA3}}, {"rope_scaling": Llama3RopeScaling(8.0, 1.0, 4.0, 64)}),
        (
            {
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 7e4, **LLAMA3},
                "rope_scaling": {"type": "llama3", **LLAMA3},
            },
            {"rope_scaling": Llama3RopeScaling(8.0, 1.0, 4.0, 64), "rope_theta": 7e4},
        ),
        ({"head_dim": 32}, {"head_dim": 32}),
        ({"head_dim": None, "num_key_value_heads": None}, {"num_kv_heads": 4}),
        ({"eos_token_id": [2, 5], "bos_token_id": 1}, {"eos_token_ids": (2, 5), "bos_token_id": 1}),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}, {}),
        ({"attention_bias": None, "mlp_bias": 0, "pretraining_tp": 2, "partial_rotary_factor": 1.0, "logit_scale": None}, {}),
        ({"quantization_config": None, "compression_config": {}, "layer_types": ["full_attention"] * 3}, {}),
        ({"unsloth_version": "2026.1", "rope_interleaved": False, "torch_dtype": "bfloat16", "is_llama_config": True}, {}),
    ],
)
def test_fields_that_are_honoured(fields, changed):
    config = LlamaConfig.from_hf(HF | fields)
    for field, value in (vars(reference.CONFIGS["gqa"]) | changed).items():
        assert getattr(config, field) == value, field


def scaled(kind: str) -> dict[str, object]:
    return {"rope_scaling": {"rope_type": kind, "factor": 2.0}}


MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
REFUSED = [
    ({"architectures": ["Qwen2ForCausalLM"]}, "architectures is .*Qwen2.*allowed: LlamaForCausalLM"),
    ({"architectures": ["LlamaForCausalLM", "GemmaForCausalLM"]}, "architectures is"),
    ({"architectures": "LlamaModel"}, "architectures is 'LlamaModel'"),
    ({"architectures": [["LlamaForCausalLM"]]}, "architectures is"),
    ({"architectures": None, "model_type": "gemma"}, "model_type is 'gemma'; allowed: llama, mistral"),
    ({"model_type": "granite"}, "model_type is 'granite'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed: 'silu'"),
    ({"attention_bias": True}, "attention_bias is True; allowed: False"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; allowed: 1.0"),
    ({"rope_interleaved": True}, "rope_interleaved is True"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
    ({"residual_multiplier": 0.22}, "residual_multiplier is 0.22"),
    ({"attention_multiplier": 0.01}, "attention_multiplier is 0.01; allowed: null"),
    ({"logits_scaling": 8.0}, "logits_scaling is 8.0"),
    ({"logit_scale": 0.0625}, "logit_scale is 0.0625"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
    ({"sliding_window": 256}, r"sliding_window is 256; allowed: null, or at least max_position_embeddings \(512\)"),
    ({"sliding_window": "all"}, "sliding_window is 'all'"),
    (MISTRAL | {"max_position_embeddings": 32768}, "sliding_window is 4096"),
    *((scaled(kind), f"rope_scaling type is '{kind}'") for kind in ("linear", "dynamic", "yarn", "longrope", "mrope")),
    ({"rope_scaling": {"type": "linear", "rope_type": "default"}}, "rope_scaling type is 'default', 'linear'"),
    ({"rope_scaling": {"type": ["llama3"]}}, "rope_scaling type is"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; allowed: an object"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no field low_freq_factor"),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": "8"}}, "factor is '8'; allowed: a finite number above 0"),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}}, "high_freq_factor is 4.0"),
    ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "rope_scaling has the field 'mrope_section'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_parameters has the field 'full_attention'"),
    ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
    ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "llama3", **LLAMA3}}, "differ"),
    ({"rope_theta": float("nan")}, "rope_theta is nan"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    ({"vocab_size": 0}, "vocab_size is 0; allowed: an integer from 1"),
    ({"hidden_size": [64]}, r"hidden_size is \[64\]"),
    ({"num_attention_heads": True}, "num_attention_heads is True"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; allowed: true or false"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
]
METHODS = ("gptq", "awq", "fp8", "bitsandbytes", "hqq", "compressed-tensors")
REFUSED += [({"quantization_config": {"quant_method": m, "bits": 4}}, f"quantization_config.*'{m}'") for m in METHODS]
REFUSED += [
    ({"compression_config": {"format": "int-quantized"}}, "compression_config says that the weights are quantised"),
    ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "text_config.quantization_config.*'awq'"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "quantization says"),
    ({"quantization_config": "int8"}, "quantization_config.*'int8'"),
]


@pytest.mark.parametrize(("fields", "error"), REFUSED)
def test_fields_that_are_refused(fields, error):
    with pytest.raises(ValueError, match=error):
        LlamaConfig.from_hf(HF | fields)


def test_defaults_of_a_mistral_are_its_own():
    fields = {field: value for field, value in HF.items() if field != "max_position_embeddings"} | MISTRAL
    with pytest.raises(ValueError, match=r"sliding_window is 4096; allowed: null, or at least .*\(131072\)"):
        LlamaConfig.from_hf(fields)
    assert LlamaConfig.from_hf(fields | {"sliding_window": None}).max_position_embeddings == 131_072
