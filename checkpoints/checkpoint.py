"""A base model as read from disk, whatever its format was."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.models.config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """`tensors` by Hugging Face name, matrices `[d_out, d_in]`; a mapping may read each one when it is asked for."""

    config: LlamaConfig
    tensors: Mapping[str, np.ndarray]
    tokenizer: Tokenizer | None = None
