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
    *(({"sliding_window": window}, f"sliding_window is {window!r}; allowed: an integer from 1") for window in ("all", 0, -1)),
    *((scaled(kind), f"rope_scaling type is '{kind}'") for kind in ("linear", "dynamic", "yarn", "longrope", "mrope")),
    ({"rope_scaling": {"type": "linear", "rope_type": "default"}}, "rope_scaling type is 'default', 'linear'"),
    ({"rope_scaling": {"type": ["llama3"]}}, "rope_scaling type is"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; allowed: an object"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no field low_freq_factor"),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": "8"}}, "factor is '8'; allowed: a finite number above 0"),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}}, "high_freq_factor is 4.0"),
    ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "rope_scaling has the field 'mrope_section'"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "finetuned": True}}, "rope_scaling type is 'yarn'"),
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
    assert LlamaConfig.from_hf(fields | {"sliding_window": None}).max_position_embeddings == 131_072
    assert LlamaConfig.from_hf(fields).max_position_embeddings == 4096


@pytest.mark.parametrize(("window", "positions"), [(256, 256), (511, 511), (512, 512), (4096, 512), (None, 512)])
def test_a_sliding_window_bounds_the_positions_as_a_text_within_it_attends_to_all_of_itself(window, positions):
    config = LlamaConfig.from_hf(HF | MISTRAL | {"sliding_window": window})
    assert config.max_position_embeddings == positions
    assert LlamaConfig.from_hf(config.to_hf()) == config


BASE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
}
BASE |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-05}
BASE |= {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "use_cache": True, "tie_word_embeddings": False}
LLAMA_2 = {"max_position_embeddings": 4096, "num_key_value_heads": 32, "pretraining_tp": 1, "rope_scaling": None}
LLAMA_31 = {"rope_theta": 5e5, "rope_scaling": LLAMA3, "num_key_value_heads": 8, "eos_token_id": [128001, 128008, 128009]}
LLAMA_31 |= {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "max_position_embeddings": 131072}
LLAMA_31["rope_scaling"] = {**LLAMA3, "rope_type": "llama3", "original_max_position_embeddings": 8192}
IN_VERSION_5 = {"rope_scaling": None, "rope_theta": None, "dtype": "bfloat16"}
IN_VERSION_5["rope_parameters"] = {**LLAMA_31["rope_scaling"], "rope_theta": 5e5, "attention_factor": None}
SMOLLM2 = {
    "is_llama_config": True,
    "rope_interleaved": False,
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
}
V0_1 = MISTRAL | {"max_position_embeddings": 32768, "num_key_value_heads": 8, "sliding_window": 4096, "rope_theta": 10000.0}
LLAMA_1 = {"architectures": ["LLaMAForCausalLM"], "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 1}
PUBLISHED = {
    "Llama 1 of an early conversion": LLAMA_1 | {"pad_token_id": -1, "transformers_version": "4.27.0.dev0"},
    "Llama 2": LLAMA_2 | {"torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "_name_or_path": "Llama-2-7b-hf"},
    "Llama 3.1": LLAMA_31 | {"torch_dtype": "bfloat16"},
    "Llama 3.2": LLAMA_31 | {"head_dim": 128, "tie_word_embeddings": True, "unsloth_fixed": True, "pad_token_id": 128004},
    "Llama 3.2 of transformers 5": LLAMA_31 | IN_VERSION_5,
    "SmolLM2": LLAMA_2 | SMOLLM2 | {"rope_theta": 100000, "tie_word_embeddings": True, "max_position_embeddings": 8192},
    "Vicuna": LLAMA_2 | {"max_sequence_length": 4096, "pad_token_id": 0},
    "Code Llama": LLAMA_2 | {"vocab_size": 32016, "rope_theta": 1000000, "max_position_embeddings": 16384},
    "no experts": LLAMA_2 | {"num_experts": 0, "num_local_experts": 0},
    "DeepSeek": LLAMA_2 | {"attention_bias": False, "bos_token_id": 100000, "eos_token_id": 100001, "vocab_size": 102400},
    "Mistral 0.1": V0_1,
    "Mistral 0.3": V0_1 | {"sliding_window": None, "rope_theta": 1e6, "vocab_size": 32768, "attention_dropout": 0.0},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name):
    config, fields = LlamaConfig.from_hf(BASE | PUBLISHED[name]), BASE | PUBLISHED[name]
    rope = fields.get("rope_parameters") or fields
    assert (config.rope_theta, config.tie_word_embeddings) == (rope.get("rope_theta", 1e4), fields["tie_word_embeddings"])
    assert (config.rope_scaling is not None) == ("3." in name and "Llama" in name)
    assert config.max_position_embeddings == (4096 if name == "Mistral 0.1" else fields["max_position_embeddings"])
