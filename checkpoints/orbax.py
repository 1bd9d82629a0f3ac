"""Base models in Orbax's format: weights as one flat tree of Hugging Face names, config and tokenizer beside it."""

from __future__ import annotations

import json
from pathlib import Path

from chameleon_jax.checkpoints import huggingface
from chameleon_jax.checkpoints.checkpoint import Checkpoint
from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.models.llama import ModelTensors

_WEIGHTS = "orbax_weights"


def is_checkpoint(directory: Path) -> bool:
    """Whether the directory was written by `save`."""
    return (directory / _WEIGHTS).is_dir()


def save(checkpoint: Checkpoint, directory: str | Path) -> None:
    """Write a directory that `load` reads; earlier weights in it are replaced."""
    import orbax.checkpoint as ocp

    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    tensors = dict(ModelTensors(checkpoint.config, checkpoint.tensors))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / _WEIGHTS, tensors, force=True)
    (directory / "config.json").write_text(json.dumps(checkpoint.config.to_hf(), indent=2))
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save(directory)


def load(directory: str | Path) -> Checkpoint:
    """Read a directory that `save` wrote; raise ValueError where it is none or cannot be served."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    directory = Path(directory).absolute()
    if not is_checkpoint(directory):
        raise ValueError(f"{directory} has no {_WEIGHTS}: not a converted checkpoint")
    config = huggingface.read_config(directory)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(directory / _WEIGHTS)
            tree = dict(getattr(metadata, "item_metadata", metadata))
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            tensors = checkpointer.restore(directory / _WEIGHTS, restore_args=args)
    except Exception as error:  # the library documents no narrower type
        raise ValueError(f"{directory / _WEIGHTS} cannot be read: {error}") from error
    return Checkpoint(config, ModelTensors(config, tensors), Tokenizer.from_directory(directory, config.eos_token_ids))
