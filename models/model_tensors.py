"""Tensors of a Llama's checkpoint by Hugging Face name: those that a model has, checked as they are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from chameleon_jax.models.config import ATTENTION_TARGETS, TARGETS, LlamaConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = ("float16", "bfloat16", "float32", "float64")

_HARMLESS = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)")
"""Follow from the config; old versions of transformers stored them, and none reads them."""
_QUANTISED = re.compile(r"scale|zero|qweight|packed|absmax|quant|SCB|g_idx|W_q", re.IGNORECASE)
_LISTED = 3


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, matrices `[d_out, d_in]`."""
    d = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, d), "model.norm.weight": (d,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, d)
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}"
        shapes |= {f"{prefix}.{norm}.weight": (d,) for norm in ("input_layernorm", "post_attention_layernorm")}
        for target in TARGETS:
            parent = "self_attn" if target in ATTENTION_TARGETS else "mlp"
            shapes[f"{prefix}.{parent}.{target}.weight"] = config.target_shape(target)[::-1]
    return shapes


class ModelTensors(Mapping[str, np.ndarray]):
    """The tensors of a model out of a checkpoint's, which may have others that mean nothing.

    Raises:
        ValueError: naming a tensor that is missing or has no place in the model, or, when it is read, one whose shape or dtype
            is another.
    """

    def __init__(self, config: LlamaConfig, tensors: Mapping[str, np.ndarray]):
        self._tensors = tensors
        self._shapes = tensor_shapes(config)
        names = dict.fromkeys(tensors)  # a mapping's own `in` reads the tensor, which takes minutes of a large model
        others = [name for name in names if name not in self._shapes and not _HARMLESS.fullmatch(name)]
        if config.tie_word_embeddings and HEAD in others:
            others.remove(HEAD)
            self._check_tied()
        if others:
            more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
            hint = " and look like parts of quantised weights" if any(map(_QUANTISED.search, others)) else ""
            raise ValueError(
                f"the checkpoint has tensors that are not served{hint}: {', '.join(others[:_LISTED])}{more}; "
                "allowed: those of a Llama of the config's sizes, without biases, not quantised"
            )
        for name in self._shapes:
            if name not in names:
                raise ValueError(f"the checkpoint has no tensor {name}")

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        tensor = np.asarray(self._tensors[name])
        if tensor.shape != shape:
            raise ValueError(f"tensor {name} is {list(tensor.shape)}; allowed: {list(shape)}, by the config")
        if tensor.dtype.name not in FLOATS:
            raise ValueError(f"tensor {name} is of dtype {tensor.dtype}; allowed: {', '.join(FLOATS)}")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _check_tied(self) -> None:
        """Raises ValueError where a checkpoint has an output matrix beside a tied embedding, and another one than that."""
        if not np.array_equal(self._tensors[HEAD], self._tensors[EMBEDDING]):
            raise ValueError(f"tie_word_embeddings is True, but {HEAD} is not {EMBEDDING}; allowed: false, or one of the two")
