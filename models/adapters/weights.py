"""Weights of one LoRA adapter, as read from a checkpoint or taken from a trainer, and before they are packed into pages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chameleon_jax.checks import require
from chameleon_jax.models.config import TARGETS, LlamaConfig


@dataclasses.dataclass(frozen=True)
class AdapterWeights:
    """Low-rank updates `y += B @ (A @ x)`, with the LoRA scale (alpha / r, or alpha / sqrt(r) for rsLoRA) folded into B.

    Attributes:
        tensors: `(layer, target) -> (A [r, d_in], B [d_out, r])`, float32, in host memory or on a device. Absent pairs are not
            adapted; r may differ from pair to pair (PEFT's rank_pattern).
    """

    tensors: dict[tuple[int, str], tuple[Any, Any]]

    @functools.cached_property
    def on_device(self) -> bool:
        """Whether one program can read every matrix where it is."""
        import jax  # here, as checks of settings read adapters before anything imports it

        arrays = jax.tree.leaves(self.tensors)
        if not all(isinstance(array, jax.Array) and array.is_fully_addressable for array in arrays):
            return False
        return len({frozenset(array.devices()) for array in arrays}) == 1

    def to_host(self) -> AdapterWeights:
        """Copy the matrices to host memory, those that are not there."""
        return AdapterWeights({where: (np.asarray(a), np.asarray(b)) for where, (a, b) in self.tensors.items()})

    def check(self, config: LlamaConfig) -> None:
        """Check that the adapter fits the model. Values are checked in host memory only.

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
            if not self.on_device and not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise ValueError(f"{where}: the weights hold NaN or infinity")

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each target: the largest over the layers, since a page id means the same rows in every layer."""
        ranks: dict[str, int] = {}
        for (_, target), (a, _) in self.tensors.items():
            ranks[target] = max(ranks.get(target, 0), a.shape[0])
        return {t: ranks[t] for t in TARGETS if t in ranks}

    def rows(self, layer: int, ranks: Mapping[str, int], config: LlamaConfig, dtype: np.dtype, xp: Any = np) -> Any:
        """Join the rows of a layer: for each target the rows of A, then those of B transposed; zeros up to the target's rank.

        The result is flat, an array of `xp`.

        Args:
            layer: Number of the layer.
            ranks: Rank of each target.
            config: The model, for the widths of rows that the layer lacks.
            dtype: Type of the elements.
            xp: `jax.numpy` where the matrices are traced.
        """
        runs = []
        for target, rank in ranks.items():
            a, b = self.tensors.get((layer, target), (None, None))
            for width, rows in zip(config.target_shape(target), (a, None if b is None else b.T)):
                found = xp.zeros((0, width), dtype) if rows is None else rows.astype(dtype)
                runs.append(xp.pad(found, ((0, rank - found.shape[0]), (0, 0))).ravel())
        return xp.concatenate(runs)


def mix(members: Sequence[tuple[AdapterWeights, float]]) -> AdapterWeights:
    """Sum updates, each times its weight: rows of A and columns of B side by side, so ranks add up. On the host, float32."""
    tensors = {}
    for where in dict.fromkeys(where for weights, _ in members for where in weights.tensors):
        pairs = [(weights.tensors[where], factor) for weights, factor in members if where in weights.tensors]
        with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite are found once they are packed
            b = np.concatenate([b * np.float32(factor) for (_, b), factor in pairs], axis=1)
        tensors[where] = (np.concatenate([a for (a, _), _ in pairs]), b)
    return AdapterWeights(tensors)
