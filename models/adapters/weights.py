"""Weights of one LoRA adapter, as read from a checkpoint or taken from a trainer, and before they are packed into pages."""

from __future__ import annotations

import dataclasses
import functools
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from chameleon_jax.checks import require
from chameleon_jax.models.config import ALL_TARGETS, TARGETS, VOCABULARY_TARGETS, LlamaConfig

Where = tuple[int, str]
"""Layer and target."""


@dataclasses.dataclass(frozen=True)
class ReplacedRows:
    """Rows of one of VOCABULARY_TARGETS in the place of the base model's.

    Attributes:
        tokens: Their tokens. None: every token of the vocabulary.
        values: `[tokens, hidden]`, on the host, in the number format of their file.
    """

    tokens: tuple[int, ...] | None
    values: np.ndarray

    def check(self, target: str, config: LlamaConfig) -> None:
        """Check that the rows fit the model. Raises ValueError."""
        tokens, vocab = self.tokens, config.vocab_size
        shape = (vocab if tokens is None else len(tokens), config.hidden_size)
        require(self.values.shape == shape, f"{target}: the shape of its rows", list(self.values.shape), str(list(shape)))
        if tokens is not None and (len(set(tokens)) < len(tokens) or not all(0 <= token < vocab for token in tokens)):
            raise ValueError(f"{target}: trained tokens are {reprlib.repr(tokens)}; allowed: 0 to {vocab - 1}, each once")
        if not np.isfinite(self.values.astype(np.float32)).all():
            raise ValueError(f"{target}: its rows hold NaN or infinity")


@dataclasses.dataclass(frozen=True)
class AdapterWeights:
    """Low-rank updates `y += B @ (A @ x)`, with the LoRA scale (alpha / r, or alpha / sqrt(r) for rsLoRA) folded into B.

    Arrays are float32, in host memory or on a device. With vectors the update is `scale * y + shift + B @ (A @ x)`, of the base
    model's y.

    Attributes:
        tensors: `(layer, target) -> (A [r, d_in], B [d_out, r])`. Absent pairs are not adapted; r may differ from pair to pair
            (PEFT's rank_pattern). A matrix of VOCABULARY_TARGETS is cut over all layers (`cut_vocabulary`).
        magnitudes: `(layer, target) -> [d_out]`, norms that DoRA gives the rows of `W + B @ A` (arXiv 2402.09353), on the host.
            `against_base` makes scales of them.
        scales: `(layer, target) -> [d_out]`, factors of the outputs, on the host.
        shifts: `(layer, target) -> [d_out]`, amounts added to the outputs, on the host.
        replaced: `target -> rows` of VOCABULARY_TARGETS. `against_base` makes low-rank updates of them.
    """

    tensors: dict[Where, tuple[Any, Any]]
    magnitudes: dict[Where, np.ndarray] = dataclasses.field(default_factory=dict)
    scales: dict[Where, np.ndarray] = dataclasses.field(default_factory=dict)
    shifts: dict[Where, np.ndarray] = dataclasses.field(default_factory=dict)
    replaced: dict[str, ReplacedRows] = dataclasses.field(default_factory=dict)

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
        tensors = {where: (np.asarray(a), np.asarray(b)) for where, (a, b) in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)

    def check(self, config: LlamaConfig) -> None:
        """Check that the adapter fits the model. Values are checked in host memory only.

        Raises:
            ValueError: It does not. The message names the matrix.
        """
        if not self.tensors and not self.replaced:
            raise ValueError("the adapter adapts no matrix of the model")
        for (layer, target), (a, b) in self.tensors.items():
            where = f"layers.{layer}.{target}"
            require(target in ALL_TARGETS, f"{where}: target", target, ", ".join(ALL_TARGETS))
            if not 0 <= layer < config.num_layers:
                raise ValueError(f"{where}: layer is {layer}; the base model has layers 0 to {config.num_layers - 1}")
            _check_pair(target if target in VOCABULARY_TARGETS else where, a, b, *config.target_shape(target))
            if not self.on_device and not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise ValueError(f"{where}: the weights hold NaN or infinity")
        for target, rows in self.replaced.items():
            rows.check(target, config)
        for field in ("magnitudes", "scales", "shifts"):
            for (layer, target), vector in getattr(self, field).items():
                where, shape = f"layers.{layer}.{target}: {field}", (config.target_shape(target)[1],)
                if (layer, target) not in self.tensors or target not in TARGETS:
                    raise ValueError(f"{where}: there is no LoRA of a layer's matrix; allowed: beside one")
                require(vector.shape == shape, f"{where}: the shape", list(vector.shape), str(list(shape)))
                if not np.isfinite(vector).all():
                    raise ValueError(f"{where}: the values hold NaN or infinity")

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """Rank of each target: the largest over the layers, since a page id means the same rows in every layer."""
        ranks: dict[str, int] = {}
        for (_, target), (a, _) in self.tensors.items():
            ranks[target] = max(ranks.get(target, 0), a.shape[0])
        return {t: ranks[t] for t in ALL_TARGETS if t in ranks}

    @functools.cached_property
    def vectors(self) -> frozenset[str]:
        """Targets whose outputs are scaled or shifted."""
        return frozenset(target for _, target in (*self.magnitudes, *self.scales, *self.shifts))

    @property
    def extras(self) -> str | None:
        """Parts of the adapter beside LoRA on the layers' matrices, for people; None without any."""
        found = [target for target in VOCABULARY_TARGETS if target in self.ranks]
        found += ["DoRA"] if self.magnitudes or self.scales else []
        found += ["biases"] if self.shifts else []
        return ", ".join(found) or None

    def rows(self, layer: int, config: LlamaConfig, dtype: np.dtype, xp: Any = np) -> Any:
        """Join the rows of a layer, in the order of `PageLayout.row_units`.

        For each target these are the rows of A and of B transposed, zeros up to the target's rank, then the scale less 1 and
        the shift where it has vectors. (A scale lies near 1, where a narrow number format is coarse.) The result is flat, an
        array of `xp`.

        Args:
            layer: Number of the layer.
            config: The model, for the widths of rows that the layer lacks.
            dtype: Type of the elements.
            xp: `jax.numpy` where the matrices are traced.
        """
        runs = []
        for target, rank in self.ranks.items():
            a, b = self.tensors.get((layer, target), (None, None))
            d_in, d_out = config.target_shape(target)
            for width, rows in zip((d_in, d_out), (a, None if b is None else b.T)):
                found = xp.zeros((0, width), dtype) if rows is None else rows.astype(dtype)
                runs.append(xp.pad(found, ((0, rank - found.shape[0]), (0, 0))).ravel())
            if target in self.vectors:
                nothing = np.zeros(d_out)
                runs.append(xp.asarray(self.scales.get((layer, target), nothing + 1) - 1, dtype))
                runs.append(xp.asarray(self.shifts.get((layer, target), nothing), dtype))
        return xp.concatenate(runs)


def _check_pair(where: str, a: Any, b: Any, d_in: int, d_out: int) -> None:
    rank = a.shape[0] if a.ndim == 2 else 0
    if a.shape != (rank, d_in) or b.shape != (d_out, rank) or rank < 1:
        raise ValueError(
            f"{where}: A is {list(a.shape)} and B {list(b.shape)}; the base model needs [r, {d_in}] and [{d_out}, r]"
        )


def cut_vocabulary(target: str, a: Any, b: Any, config: LlamaConfig) -> dict[Where, tuple[Any, Any]]:
    """Cut the matrices of one of VOCABULARY_TARGETS over the layers, the last part padded with zeros.

    The update of the whole is the sum of the parts' for `embed_tokens`, and their outputs side by side for `lm_head`.

    Args:
        target: `embed_tokens`, with A `[r, vocab]` and B `[hidden, r]`; or `lm_head`, with A `[r, hidden]` and B `[vocab, r]`.
        a: A.
        b: B.
        config: The model.

    Raises:
        ValueError: A shape is wrong.
    """
    vocab, hidden, cut = config.vocab_size, config.hidden_size, config.vocab_cut
    embeds = target == "embed_tokens"
    _check_pair(target, a, b, *((vocab, hidden) if embeds else (hidden, vocab)))
    parts = {}
    for layer in range(config.num_layers):
        here = slice(layer * cut, (layer + 1) * cut)
        parts[layer, target] = (_padded(a[:, here], 1, cut), b) if embeds else (a, _padded(b[here], 0, cut))
    return parts


def _padded(matrix: Any, axis: int, size: int) -> Any:
    missing = size - matrix.shape[axis]
    if not missing:
        return matrix
    import jax.numpy as jnp  # here, as above

    xp: Any = np if isinstance(matrix, np.ndarray) else jnp
    return xp.pad(matrix, [(0, missing if i == axis else 0) for i in range(2)])


def mix(members: Sequence[tuple[AdapterWeights, float]]) -> AdapterWeights:
    """Sum updates, each times its weight: rows of A and columns of B side by side, so ranks add up. On the host, float32."""
    tensors = {}
    for where in dict.fromkeys(where for weights, _ in members for where in weights.tensors):
        pairs = [(weights.tensors[where], factor) for weights, factor in members if where in weights.tensors]
        with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite are found once they are packed
            b = np.concatenate([b * np.float32(factor) for (_, b), factor in pairs], axis=1)
        tensors[where] = (np.concatenate([a for (a, _), _ in pairs]), b)
    return AdapterWeights(tensors)
