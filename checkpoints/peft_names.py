"""Names of tensors in PEFT's state dicts, taken apart into matrices and their parts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from chameleon_jax.checkpoints.peft_config import AdapterError
from chameleon_jax.models.config import ATTENTION_TARGETS, TARGETS

_NAME = re.compile(
    r"^(?:base_model\.model\.)?(model\.layers\.(\d{1,6})\.(self_attn|mlp)\.(\w+)|model\.embed_tokens|lm_head)\.(.+)$"
)
_PARENT = {t: "self_attn" if t in ATTENTION_TARGETS else "mlp" for t in TARGETS}
_LORA = {"lora_A.weight": "A", "lora_B.weight": "B"}
_WHOLE = {"weight": "whole", "base_layer.weight": "whole", "token_adapter.trainable_tokens_delta": "tokens"}
_OF_LAYERS = _LORA | {
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_PARTS = {t: _OF_LAYERS for t in TARGETS} | {
    "embed_tokens": _WHOLE | {"lora_embedding_A": "A", "lora_embedding_B": "B"},
    "lm_head": _WHOLE | _LORA,
}


@dataclasses.dataclass
class AdaptedModule:
    """A matrix of the model, and an adapter's tensors for it.

    Attributes:
        name: Its name in the model.
        layer: Number of its layer; None outside the layers.
        target: One of `models.config.ALL_TARGETS`.
        parts: Tensors: "A" and "B" of LoRA, the "bias" of B, DoRA's "magnitude", the "whole" matrix in the place of the base's,
            and its rows for some "tokens".
    """

    name: str
    layer: int | None
    target: str
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)


def modules_of(tensors: Mapping[str, Any]) -> list[AdaptedModule]:
    """Group the tensors of a state dict by the matrix that they belong to.

    Raises AdapterError for a tensor that has no place in an adapter, or is there twice.
    """
    modules: dict[tuple[int | None, str], AdaptedModule] = {}
    for name, tensor in tensors.items():
        module, part = _parse(name)
        known = modules.setdefault((module.layer, module.target), module)
        if part in known.parts:
            raise AdapterError(f"tensor {name} is in the wrong place, or there twice")
        known.parts[part] = tensor
    return list(modules.values())


def _parse(name: str) -> tuple[AdaptedModule, str]:
    """Name of a tensor as its matrix, without parts, and the part that it is."""
    match = _NAME.match(name)
    target = (match[4] or match[1].removeprefix("model.")) if match else ""
    if match is None or target not in _PARTS:
        raise AdapterError(f"tensor {name} is not of a matrix that adapters change; allowed targets: {', '.join(_PARTS)}")
    if match[3] != _PARENT.get(target):
        raise AdapterError(f"tensor {name} is in the wrong place, or there twice")
    part = _PARTS[target].get(match[5].replace(".default", "", 1))
    if part is None:
        raise AdapterError(f"tensor {name} is not served; allowed of {target}: {', '.join(_PARTS[target])}")
    return AdaptedModule(match[1], int(match[2]) if match[2] else None, target), part


def tensor_name(layer: int, target: str, side: str) -> str:
    """Name in PEFT's state dict of one matrix of a layer. Args: side: "A" or "B"."""
    return f"base_model.model.model.layers.{layer}.{_PARENT[target]}.{target}.lora_{side}.weight"
