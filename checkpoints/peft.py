"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, checked before anything changes."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from chameleon_jax.checkpoints import safetensors_file
from chameleon_jax.checkpoints.peft_config import CONFIG_FILE, AdapterError, PeftConfig, read_config
from chameleon_jax.memory.adapters import MAX_RANK
from chameleon_jax.models.adapters.weights import AdapterWeights
from chameleon_jax.models.config import ATTENTION_TARGETS, TARGETS, LlamaConfig

WEIGHTS_FILE = "adapter_model.safetensors"
MAX_HEADER_BYTES = 16 << 20
"""Bytes allowed beside the weights in their file, for safetensors' header with names and metadata."""

_KEY = re.compile(
    r"^(?:base_model\.model\.)?(model\.layers\.(\d{1,6})\.(?:self_attn|mlp)\.(\w+))\.lora_([AB])(?:\.default)?\.weight$"
)
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|lm_head)\.(.*)")
_PARENT = {t: "self_attn" if t in ATTENTION_TARGETS else "mlp" for t in TARGETS}

Pair = dict[str, Any]
"""A and B of one matrix, keyed "A" and "B": arrays of NumPy or JAX."""


def load(directory: str | Path, config: LlamaConfig) -> AdapterWeights:
    """Read an adapter for a base model, its scale folded into B.

    Raises:
        AdapterError: a file is missing or broken, the adapter is of a kind that is not served, or it does not fit the base
            model. No other error is raised, however odd the files are.
    """
    directory = Path(directory)
    try:
        adapter = assemble(read_config(directory), _read_tensors(directory, config), config)
    except AdapterError:
        raise
    except Exception as error:  # from a library or the file system, or out of memory
        raise AdapterError(f"{directory.name} cannot be read: {error!r}") from error
    try:
        adapter.check(config)
    except ValueError as error:
        raise AdapterError(f"{directory.name} does not fit the base model: {error}") from error
    return adapter


def assemble(settings: PeftConfig, tensors: Mapping[str, Any], config: LlamaConfig) -> AdapterWeights:
    """Make an adapter of its tensors by PEFT's names, its scale folded into B. `AdapterWeights.check` compares shapes.

    Raises AdapterError where a tensor does not belong to a LoRA of the model, or the settings tell otherwise of it.
    """
    _check_embeddings(tensors, config)
    return AdapterWeights(_scale(settings, *_group_by_module(tensors)))


def _read_tensors(directory: Path, config: LlamaConfig) -> dict[str, np.ndarray]:
    file = directory / WEIGHTS_FILE
    if not file.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        hint = ": adapter_model.bin is pickled and is never opened, convert it to safetensors" if pickled else ""
        raise AdapterError(f"{directory.name} has no {WEIGHTS_FILE}{hint}")
    widths = sum(sum(config.target_shape(target)) for target in TARGETS)
    try:  # the largest that fits, in float64
        return safetensors_file.read_file(file, config.num_layers * widths * MAX_RANK * 8 + MAX_HEADER_BYTES)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file.name} cannot be read: {error}") from error


def _check_embeddings(tensors: Mapping[str, Any], config: LlamaConfig) -> None:
    """Refuse an adapter that has embeddings of its own or adapts them, as one for a resized vocabulary does."""
    found = [(name, match[1], tensor.shape) for name, tensor in tensors.items() if (match := _EMBEDDING.search(name))]
    if not found:
        return
    whole = [(name, shape) for name, part, shape in found if "lora_" not in part]
    sizes = [s[1] for _, part, s in found if "lora_embedding_A" in part and len(s) == 2]
    sizes += [s[0] for _, part, s in found if part in ("weight", "lora_B.weight", "base_layer.weight") and len(s) == 2]
    vocab = f"for a vocabulary of {sizes[0]}; the base model has {config.vocab_size}" if sizes else "which are not served"
    name, does = (whole[0][0], "has embeddings of its own") if whole else (found[0][0], "adapts embeddings")
    hint = ""
    if whole and sizes and sizes[0] == config.vocab_size:
        hint = ", or save the adapter without them if they were not trained (peft's save_embedding_layers=False)"
    raise AdapterError(
        f"tensor {name}: the adapter {does}, {vocab}. Requests share the base model's embeddings: "
        f"merge the adapter into its base model and serve that{hint}"
    )


def _group_by_module(tensors: Mapping[str, Any]) -> tuple[dict[tuple[int, str], Pair], dict[tuple[int, str], str]]:
    """Collect A and B, and the module's name, of each layer and target; refuse a tensor that is neither A nor B."""
    pairs: dict[tuple[int, str], Pair] = {}
    modules: dict[tuple[int, str], str] = {}
    for name, tensor in tensors.items():
        match = _KEY.match(name)
        if match is None or match[3] not in TARGETS:
            raise AdapterError(f"tensor {name} is not a LoRA matrix of a layer; allowed targets: {', '.join(TARGETS)}")
        where = (int(match[2]), match[3])
        if f".{_PARENT[match[3]]}." not in match[1] or match[4] in pairs.get(where, {}):
            raise AdapterError(f"tensor {name} is in the wrong place, or there twice")
        pairs.setdefault(where, {})[match[4]] = tensor
        modules[where] = match[1]
    return pairs, modules


def _scale(
    settings: PeftConfig, pairs: Mapping[tuple[int, str], Pair], modules: Mapping[tuple[int, str], str]
) -> dict[tuple[int, str], tuple[Any, Any]]:
    """Convert the matrices to float32 with the config's scale in B; refuse matrices that do not fit the config."""
    names = list(modules.values())
    ranks, targeted = settings.ranks(names), settings.targeted(names)
    scales = settings.scales(ranks)
    weights: dict[tuple[int, str], tuple[Any, Any]] = {}
    for where, pair in pairs.items():
        module = modules[where]
        if missing := {"A", "B"} - pair.keys():
            raise AdapterError(f"{module} has no lora_{missing.pop()}")
        layers = settings.layers_to_transform
        if module not in targeted or (layers and where[0] not in layers):
            fields = ("target_modules", "exclude_modules", "layers_to_transform")
            given = ", ".join(f"{f} ({reprlib.repr(v)})" for f in fields if (v := getattr(settings, f)))
            raise AdapterError(f"{module} has weights, but by {given} it is not adapted")
        with np.errstate(over="ignore"):  # `AdapterWeights.check` finds values that are not finite
            a, b = pair["A"].astype(np.float32), pair["B"].astype(np.float32)
        rank = ranks[module]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise AdapterError(f"{module}: A is {list(a.shape)}, B {list(b.shape)}; the config says rank {rank}")
        with np.errstate(over="ignore", invalid="ignore"):
            weights[where] = (a, b * np.float32(scales[module]))
    return weights


def tensor_name(layer: int, target: str, side: str) -> str:
    """Name in PEFT's state dict of one matrix. Args: side: "A" or "B"."""
    return f"base_model.model.model.layers.{layer}.{_PARENT[target]}.{target}.lora_{side}.weight"


def save(
    directory: str | Path,
    tensors: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]],
    *,
    alpha: float,
    base_model: str,
    dtype: Any = np.float32,
) -> None:
    """Write an adapter that `peft` loads.

    Args:
        directory: created where it does not exist.
        tensors: `(layer, target) -> (A [r, d_in], B [d_out, r])`, not scaled; all of one rank.
        alpha: numerator of the scale alpha / r.
        base_model: name or path of the base model, for `peft`.
        dtype: type of the tensors in the file.

    Raises:
        ValueError: the matrices differ in rank.
    """
    ranks = {a.shape[0] for a, _ in tensors.values()}
    if len(ranks) != 1:
        raise ValueError(f"the matrices have the ranks {sorted(ranks)}; allowed: one")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    named = {}
    for (layer, target), pair in tensors.items():
        for side, matrix in zip("AB", pair):
            named[tensor_name(layer, target, side)] = np.ascontiguousarray(matrix, dtype)
    safetensors.numpy.save_file(named, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    present = {target for _, target in tensors}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": ranks.pop(),
        "lora_alpha": alpha,
        "target_modules": [t for t in TARGETS if t in present],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(settings, indent=2))
