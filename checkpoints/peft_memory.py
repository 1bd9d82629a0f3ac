"""LoRA adapters from memory: a trainer's arrays, or a state dict of PEFT, in the place of files."""

from __future__ import annotations

import enum
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.checkpoints import peft, peft_names
from chameleon_jax.checkpoints.peft_config import AdapterError, PeftConfig
from chameleon_jax.models.adapters.weights import AdapterWeights
from chameleon_jax.models.config import TARGETS, LlamaConfig

Pairs = Iterable[tuple[int, str, Any]]
"""Layer, target, and the pair (A, B) of each adapted matrix."""


def take(weights: Any, peft_config: Any, config: LlamaConfig) -> AdapterWeights:
    """Take an adapter that is in memory, its scale folded into B. Nothing is written to, and nothing goes through a file.

    Arrays of JAX stay where they are; tensors of PyTorch are copied to the host if they are elsewhere. The result may share
    memory with `weights`.

    Args:
        weights: A state dict of PEFT, `name -> array`; or pairs (A `[r, d_in]`, B `[d_out, r]`), neither scaled, as a list with
            `{target: (A, B)}` for each layer, as `{(layer, target): (A, B)}`, or stacked as
            `{target: (A [layers, r, d_in], B [layers, d_out, r])}`. Arrays are NumPy's, JAX's or PyTorch's.
        peft_config: A LoraConfig of PEFT, or a mapping with its fields; lora_alpha at least. r is by default the first A's.
        config: The base model.

    Raises:
        AdapterError: A tensor or a setting is wrong, or the adapter does not fit the base model; the text names it.
    """
    try:
        tensors = {name: _array(name, value) for name, value in _state_dict(weights).items()}
        adapter = peft.assemble(_settings(peft_config, tensors), tensors, config)
        adapter.check(config)
    except AdapterError:
        raise
    except Exception as error:  # an array that was deleted or donated, say
        raise AdapterError(f"weights cannot be served: {error}") from error
    return adapter


def _settings(peft_config: Any, tensors: Mapping[str, Any]) -> PeftConfig:
    fields = peft_config.to_dict() if hasattr(peft_config, "to_dict") else dict(peft_config or {})
    if fields.get("lora_alpha") is None:
        raise AdapterError(f"peft_config has {', '.join(map(str, fields)) or 'no fields'}; allowed: lora_alpha at least")
    first_a = next((array for name, array in tensors.items() if ".lora_A." in name or "lora_embedding_A" in name), None)
    rank = 1 if first_a is None or not first_a.ndim else first_a.shape[0]  # no other than A has a rank
    return PeftConfig.from_json({"r": rank} | {name: _plain(value) for name, value in fields.items()})


def _plain(value: Any) -> Any:
    """Value as JSON would have it: LoraConfig has sets of names and enumerations."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return sorted(value) if isinstance(value, set | frozenset) else list(value) if isinstance(value, tuple) else value


def _state_dict(weights: Any) -> Mapping[str, Any]:
    """Arrays by PEFT's names."""
    if isinstance(weights, Mapping) and all(isinstance(name, str) and hasattr(v, "shape") for name, v in weights.items()):
        return weights
    named = {}
    for layer, target, pair in _pairs(weights):
        if target not in TARGETS:
            raise AdapterError(f"weights of layer {layer}: target is {reprlib.repr(target)}; allowed: {', '.join(TARGETS)}")
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise AdapterError(f"weights of layer {layer}, {target}: a {type(pair).__name__}; allowed: a pair (A, B)")
        named.update({peft_names.tensor_name(layer, target, side): matrix for side, matrix in zip("AB", pair)})
    return named


def _pairs(weights: Any) -> Pairs:
    if isinstance(weights, Mapping) and all(isinstance(where, tuple) and len(where) == 2 for where in weights):
        return ((layer, target, pair) for (layer, target), pair in weights.items())
    if isinstance(weights, Mapping):
        stacks = [(target, zip(*pair, strict=True)) for target, pair in weights.items()]
        return ((layer, target, pair) for target, layers in stacks for layer, pair in enumerate(layers))
    if isinstance(weights, Sequence) and all(isinstance(layer, Mapping) for layer in weights):
        return ((i, target, pair) for i, layer in enumerate(weights) for target, pair in layer.items())
    raise AdapterError(f"weights is a {type(weights).__name__}; allowed: a state dict of PEFT, or pairs (A, B) by target")


def _array(name: str, value: Any) -> Any:
    """Array of NumPy or JAX, with numbers that float32 can stand for."""
    if hasattr(value, "detach"):  # PyTorch's; NumPy has no bfloat16 of its own to take it as it is
        value = value.detach().cpu().float().numpy()
    if not isinstance(value, np.ndarray | jax.Array):
        raise AdapterError(f"tensor {name} is a {type(value).__name__}; allowed: an array of NumPy, JAX or PyTorch")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise AdapterError(f"tensor {name} has dtype {value.dtype}; allowed: floating point")
    return value
