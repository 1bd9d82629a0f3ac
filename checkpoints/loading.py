"""Checkpoints of any format, found by a model argument."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from chameleon_jax.checkpoints import huggingface, orbax
from chameleon_jax.checkpoints.checkpoint import Checkpoint
from chameleon_jax.models.config import PRESETS, LlamaConfig


def load_checkpoint(model: str) -> Checkpoint:
    """Read a base model.

    Args:
        model: a GGUF file, an Orbax or Hugging Face directory, the packaged `smollm2-135m`, or a hub id.

    Raises:
        ValueError: the model cannot be found or served; says why.
    """
    path = Path(model)
    if model == "smollm2-135m" or path.suffix == ".gguf":
        if importlib.util.find_spec("gguf") is None:
            raise ValueError(f"model is {model!r}; GGUF files need the package gguf, which is not installed (pip install gguf)")
        from chameleon_jax.checkpoints import gguf  # here, since other models load without the package
    if model == "smollm2-135m":
        return gguf.load(gguf.smollm2_path())
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model is {model!r}: no such file")
        return gguf.load(path)
    if orbax.is_checkpoint(path):
        return orbax.load(path)
    return huggingface.load(model)


def dummy_config(model: str) -> LlamaConfig:
    """Find the configuration for dummy weights, in a preset or a directory's config.json."""
    if model in PRESETS:
        return PRESETS[model]
    if not (Path(model) / "config.json").is_file():
        raise ValueError(
            f"model is {model!r}; with load_format='dummy' allowed: {', '.join(PRESETS)}, or a directory with config.json"
        )
    return huggingface.read_config(Path(model))
