"""A base model as an engine takes it: weights on the device, shape, tokenizer, sampling defaults."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from chameleon_jax.checkpoints import huggingface
from chameleon_jax.checkpoints.loading import dummy_config, load_checkpoint
from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.config import EngineConfig
from chameleon_jax.models import llama
from chameleon_jax.models.config import LlamaConfig

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """Base model.

    Attributes:
        weights: Model with its weights on the device.
        dtype: Their type.
        config: Its shape.
        tokenizer: Its tokenizer; None where it has none.
        generation_config: Its generation_config.json; None where it has none.
    """

    weights: llama.Llama
    dtype: jnp.dtype
    config: LlamaConfig
    tokenizer: Tokenizer | None
    generation_config: Path | None


def load_model(model: str, config: EngineConfig) -> LoadedModel:
    """Read a checkpoint, or draw random weights for its shape. Raises ValueError where it cannot be served."""
    begin = time.perf_counter()
    dtype = jnp.dtype(_dtype(config.dtype))
    if config.load_format == "dummy":
        shape = dummy_config(model)
        weights = llama.random_model(shape, dtype, config.seed)
        loaded = LoadedModel(weights, dtype, shape, None, huggingface.generation_file(Path(model)))
    else:
        found = load_checkpoint(model)
        weights = llama.load_tensors(found.config, found.tensors, dtype)
        loaded = LoadedModel(weights, dtype, found.config, found.tokenizer, found.generation_config)
    logger.info("weights of %s are read as %s, in %.1f s", model, dtype.name, time.perf_counter() - begin)
    return loaded


def _dtype(name: str) -> str:
    return name if name != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
