"""A base model as read from disk, independent of its format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.models.config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A base model.

    Attributes:
        config: sizes of the model.
        tensors: tensors by Hugging Face name, matrices `[d_out, d_in]`. The mapping may read each one when it is asked for.
        tokenizer: tokenizer of the model; None where the checkpoint has none.
        generation_config: file with sampling defaults; None where the checkpoint has none.
    """

    config: LlamaConfig
    tensors: Mapping[str, np.ndarray]
    tokenizer: Tokenizer | None = None
    generation_config: Path | None = None
