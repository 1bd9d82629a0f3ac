"""Checkpoints of any format, found by a model argument."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from chameleon_jax.checkpoints import huggingface, orbax
from chameleon_jax.checkpoints.checkpoint import Checkpoint


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
