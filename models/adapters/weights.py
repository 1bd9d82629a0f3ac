"""Weights of one LoRA adapter on the host, as read from a checkpoint and before they are packed into pages."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from chameleon_jax.checks import require
from chameleon_jax.models.config import TARGETS, LlamaConfig


@dataclasses.dataclass(frozen=True)
class AdapterWeights:
    """Low-rank updates `y += B @ (A @ x)`, with the LoRA scale (alpha / r, or alpha / sqrt(r) for rsLoRA) folded into B.

    Attributes:
        tensors: `(layer, target) -> (A [r, d_in], B [d_out, r])`, float32. Absent pairs are not adapted; r may differ from
            pair to pair (PEFT's rank_pattern).
    """

    tensors: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]

    def check(self, config: LlamaConfig) -> None:
        """Check that the adapter fits the model.

        Raises:
            ValueError: It does not. The message names the matrix.
        """
        if not self.tensors:
            raise ValueError("the adapter adapts no matrix of the model")
        for (layer, target), (a, b) in self.tensors.items():
            where = f"layers.{layer}.{target}"
            require(target in TARGETS, f"{where}: target", target, ", ".join(TARGETS))
            if not 0 <= layer < config.num_layers:
                raise ValueError(f"{where}: layer is {layer}; the base model has layers 0 to {config.num_layers - 1}")
            d_in, d_out = config.target_shape(target)
            rank = a.shape[0] if a.ndim == 2 else 0
            if a.shape != (rank, d_in) or b.shape != (d_out, rank) or rank < 1:
                raise ValueError(
                    f"{where}: A is {list(a.shape)} and B {list(b.shape)}; the base model needs [r, {d_in}] and [{d_out}, r]"
                )
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise ValueError(f"{where}: the weights hold NaN or infinity")

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each target: the largest over the layers, since a page id means the same rows in every layer."""
        ranks: dict[str, int] = {}
        for (_, target), (a, _) in self.tensors.items():
            ranks[target] = max(ranks.get(target, 0), a.shape[0])
        return {t: ranks[t] for t in TARGETS if t in ranks}

    @property
    def content_hash(self) -> str:
        """Identity of the adapter: the same weights have the same hash whatever their name or file."""
        digest = hashlib.sha256()
        for layer, target in sorted(self.tensors):
            digest.update(f"{layer}.{target}".encode())
            for matrix in self.tensors[layer, target]:
                digest.update(str(matrix.shape).encode())
                digest.update(np.ascontiguousarray(matrix, dtype=np.float32).data)
        return digest.hexdigest()
