"""Base models in Orbax's format: weights as one flat tree of Hugging Face names, config and tokenizer beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from chameleon_jax.checkpoints import huggingface
from chameleon_jax.checkpoints.checkpoint import Checkpoint
from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.models.llama import ModelTensors

WEIGHTS = "orbax_weights"


def is_checkpoint(directory: Path) -> bool:
    """Whether the directory was written by `save`."""
    return (directory / WEIGHTS).is_dir()


def write_tensors(directory: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors to the weights of a directory, which is made; earlier ones in it are replaced."""
    import orbax.checkpoint as ocp

    directory.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / WEIGHTS, dict(tensors), force=True)


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Read what `write_tensors` wrote. Raises errors of many types where it is broken."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(directory / WEIGHTS)
        tree = dict(getattr(metadata, "item_metadata", metadata))
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        tensors: dict[str, np.ndarray] = checkpointer.restore(directory / WEIGHTS, restore_args=args)
        return tensors


def save(checkpoint: Checkpoint, directory: str | Path) -> None:
    """Write a directory that `load` reads; earlier weights in it are replaced."""
    directory = Path(directory).absolute()
    write_tensors(directory, ModelTensors(checkpoint.config, checkpoint.tensors))
    (directory / "config.json").write_text(json.dumps(checkpoint.config.to_hf(), indent=2))
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save(directory)


def load(directory: str | Path) -> Checkpoint:
    """Read a directory that `save` wrote; raise ValueError where it is none or cannot be served."""
    directory = Path(directory).absolute()
    if not is_checkpoint(directory):
        raise ValueError(f"{directory} has no {WEIGHTS}: not a converted checkpoint")
    config = huggingface.read_config(directory)
    try:
        tensors = read_tensors(directory)
    except Exception as error:  # the library documents no narrower type
        raise ValueError(f"{directory / WEIGHTS} cannot be read: {error}") from error
    return Checkpoint(config, ModelTensors(config, tensors), Tokenizer.from_directory(directory, config.eos_token_ids))
