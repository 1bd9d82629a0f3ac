"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, checked before anything changes."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from chameleon_jax.checkpoints import safetensors_file
from chameleon_jax.checkpoints.peft_config import CONFIG_FILE, MAX_CONFIG_BYTES, AdapterError, PeftConfig, read_config
from chameleon_jax.checkpoints.peft_names import AdaptedModule, modules_of, tensor_name
from chameleon_jax.checkpoints.remote_adapter import local_directory
from chameleon_jax.memory.adapters import MAX_RANK
from chameleon_jax.models.adapters.weights import AdapterWeights, ReplacedRows, cut_vocabulary
from chameleon_jax.models.config import TARGETS, LlamaConfig

WEIGHTS_FILE = "adapter_model.safetensors"
MAX_HEADER_BYTES = 16 << 20
"""Bytes allowed beside the weights in their file, for safetensors' header with names and metadata."""


def load(path: str | Path, config: LlamaConfig) -> AdapterWeights:
    """Read an adapter for a base model, its scale folded into B.

    Args:
        path: Directory of the adapter, or the URL of one, as s3://bucket/adapter.
        config: Base model.

    Raises:
        AdapterError: a file is missing or broken, the adapter is of a kind that is not served, or it does not fit the base
            model. No other error is raised, however odd the files are.
    """
    name = Path(path).name
    limits = {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: _max_file_bytes(config)}
    try:
        with local_directory(path, limits) as directory:
            adapter = assemble(read_config(directory), _read_tensors(directory, config), config)
    except AdapterError:
        raise
    except Exception as error:  # from a library or the file system, or out of memory
        raise AdapterError(f"{name} cannot be read: {error!r}") from error
    try:
        adapter.check(config)
    except ValueError as error:
        raise AdapterError(f"{name} does not fit the base model: {error}") from error
    return adapter


def assemble(settings: PeftConfig, tensors: Mapping[str, Any], config: LlamaConfig) -> AdapterWeights:
    """Make an adapter of its tensors by PEFT's names, its scale folded into B. `AdapterWeights.check` compares shapes.

    Raises AdapterError where a tensor does not belong to a LoRA of the model, or the settings tell otherwise of it.
    """
    modules = modules_of(tensors)
    _check_vocabulary(settings, modules, config)
    low_rank = [module for module in modules if module.parts.keys() - {"whole", "tokens"}]
    names = [module.name for module in low_rank]
    ranks, targeted = settings.ranks(names), settings.targeted(names)
    scales = settings.scales(ranks)
    found = AdapterWeights({}, replaced=_replaced_rows(settings, modules, config))
    for module in low_rank:
        _check_targeted(settings, module, targeted)
        with np.errstate(over="ignore"):
            scale = np.float32(scales[module.name])
        a, b = _matrices(module, ranks[module.name], scale)
        _check_part(module, "magnitude", "use_dora", settings.use_dora)
        if module.layer is None:
            found.tensors.update(_cut(module, a, b, config))
            continue
        where = module.layer, module.target
        found.tensors[where] = a, b
        if settings.use_dora:
            found.magnitudes[where] = _vector(module.parts["magnitude"])
        _check_part(module, "bias", "lora_bias", settings.lora_bias)
        if settings.lora_bias:
            with np.errstate(over="ignore", invalid="ignore"):
                found.shifts[where] = _vector(module.parts["bias"]) * scale
    return found


def _read_tensors(directory: Path, config: LlamaConfig) -> dict[str, np.ndarray]:
    file = directory / WEIGHTS_FILE
    if not file.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        hint = ": adapter_model.bin is pickled and is never opened, convert it to safetensors" if pickled else ""
        raise AdapterError(f"{directory.name} has no {WEIGHTS_FILE}{hint}")
    try:
        return safetensors_file.read_file(file, _max_file_bytes(config))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file.name} cannot be read: {error}") from error


def _max_file_bytes(config: LlamaConfig) -> int:
    """Bytes of the largest adapter that fits, in float64, with the base model's embeddings in float32 beside it."""
    widths = sum(sum(config.target_shape(target)) for target in TARGETS)
    vocabulary = 2 * MAX_RANK * (config.vocab_size + config.hidden_size)
    low_rank = (config.num_layers * widths * MAX_RANK + vocabulary) * 8
    return low_rank + 2 * config.vocab_size * config.hidden_size * 4 + MAX_HEADER_BYTES


def _check_vocabulary(settings: PeftConfig, modules: Sequence[AdaptedModule], config: LlamaConfig) -> None:
    """Refuse an adapter for a resized vocabulary, whose tokens the base model's tokenizer does not have."""
    for module in modules:
        if module.layer is not None:
            continue
        if settings.ensure_weight_tying and module.parts.keys() - {"tokens"}:
            raise AdapterError(f"ensure_weight_tying is True: {module.name} shares no adapter with another; allowed: false")
        sides = {"whole": 0, "A" if module.target == "embed_tokens" else "B": int(module.target == "embed_tokens")}
        for part, axis in sides.items():
            tensor = module.parts.get(part)
            if tensor is not None and tensor.ndim == 2 and tensor.shape[axis] != config.vocab_size:
                raise AdapterError(
                    f"{module.name} is for a vocabulary of {tensor.shape[axis]}; the base model has {config.vocab_size}. "
                    "Requests share its tokenizer: merge the adapter into its base model and serve that"
                )


def _replaced_rows(settings: PeftConfig, modules: Sequence[AdaptedModule], config: LlamaConfig) -> dict[str, ReplacedRows]:
    """Collect rows that stand in the place of the base model's: of whole matrices, and of trained tokens."""
    found: dict[str, ReplacedRows] = {}
    wanted = {"modules_to_save": settings.saved_modules, "trainable_token_indices": settings.trainable_tokens}
    for (field, targets), part in zip(wanted.items(), ("whole", "tokens")):
        for target in targets:
            if not any(module.target == target and part in module.parts for module in modules):
                raise AdapterError(f"{field} names {target}, and the adapter has no weights of it")
    for module in modules:
        parts, tokens = module.parts, settings.trainable_tokens.get(module.target)
        if "whole" in parts and "tokens" in parts:
            raise AdapterError(f"{module.name} has a whole matrix and rows of trained tokens; allowed: one of them")
        if "whole" in parts:
            found[module.target] = ReplacedRows(None, np.asarray(parts["whole"]))
        if "tokens" in parts:
            if tokens is None:
                raise AdapterError(f"{module.name} has rows of trained tokens, and trainable_token_indices does not name them")
            found[module.target] = ReplacedRows(tuple(tokens), np.asarray(parts["tokens"]))
    if config.tie_word_embeddings and (rows := found.get("embed_tokens")) is not None and rows.tokens is not None:
        found.setdefault("lm_head", rows)  # as peft does
    return found


def _check_targeted(settings: PeftConfig, module: AdaptedModule, targeted: Collection[str]) -> None:
    layers = settings.layers_to_transform
    if module.name not in targeted or (layers and module.layer is not None and module.layer not in layers):
        fields = ("target_modules", "exclude_modules", "layers_to_transform")
        given = ", ".join(f"{f} ({reprlib.repr(v)})" for f in fields if (v := getattr(settings, f)))
        raise AdapterError(f"{module.name} has weights, but by {given} it is not adapted")


def _check_part(module: AdaptedModule, part: str, field: str, wanted: bool) -> None:
    if (part in module.parts) != wanted:
        raise AdapterError(f"{module.name} has {'no' if wanted else 'a'} {part}, but {field} is {wanted}")


def _matrices(module: AdaptedModule, rank: int, scale: np.float32) -> tuple[Any, Any]:
    """Convert A and B to float32, the scale folded into B; refuse matrices that do not fit the config."""
    if missing := {"A", "B"} - module.parts.keys():
        raise AdapterError(f"{module.name} has no lora_{missing.pop()}")
    with np.errstate(over="ignore"):  # `AdapterWeights.check` finds values that are not finite
        a, b = (module.parts[side].astype(np.float32) for side in "AB")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterError(f"{module.name}: A is {list(a.shape)}, B {list(b.shape)}; the config says rank {rank}")
    with np.errstate(over="ignore", invalid="ignore"):
        return a, b * scale


def _cut(module: AdaptedModule, a: Any, b: Any, config: LlamaConfig) -> dict[tuple[int, str], tuple[Any, Any]]:
    try:
        return cut_vocabulary(module.target, a, b, config)
    except ValueError as error:
        raise AdapterError(f"{module.name} does not fit the base model: {error}") from error


def _vector(tensor: Any) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(tensor).astype(np.float32)


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
