"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors. All is checked before anything changes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from chameleon_jax.models.adapter_weights import AdapterWeights
from chameleon_jax.models.config import TARGETS, LlamaConfig

MAX_RANK = 256
_KEY = re.compile(
    r"^(?:base_model\.model\.)?(model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+))\.lora_([AB])(?:\.default)?\.weight$"
)
_PARENT = {t: "self_attn" if t in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp" for t in TARGETS}


class AdapterError(ValueError):
    """An adapter that cannot be served; the text says what and why."""


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What of adapter_config.json decides the weights' meaning."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    target_modules: str | Sequence[str] | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PeftConfig:
        """Raises AdapterError where the adapter is not a plain LoRA."""
        kind = str(data.get("peft_type", "LORA")).upper()
        if kind != "LORA":
            raise AdapterError(f"peft_type is {kind!r}; allowed: LORA")
        refused = {
            "use_dora": "DoRA rescales the base weights, which requests share",
            "lora_bias": "biases are not served",
            "modules_to_save": "it replaces whole modules, which requests share",
            "trainable_token_indices": "it replaces embeddings, which requests share",
            "fan_in_fan_out": "the base model's matrices are not transposed",
            "layer_replication": "it changes the base model's layers",
            "target_parameters": "only linear layers are adapted",
        }
        for field, why in refused.items():
            if data.get(field):
                raise AdapterError(f"{field} is {data[field]!r}: {why}")
        if data.get("bias", "none") != "none":
            raise AdapterError(f"bias is {data['bias']!r}; allowed: 'none'")
        r = data.get("r")
        if not isinstance(r, int) or not 1 <= r <= MAX_RANK:
            raise AdapterError(f"r is {r!r}; allowed: 1 to {MAX_RANK}")
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in data.get(field) or {}:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise AdapterError(f"{field} has {pattern!r}, which is no pattern: {error}") from error
        alpha = data.get("lora_alpha", 8)
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise AdapterError(f"lora_alpha is {alpha!r}; allowed: a finite number")
        return cls(
            r=r,
            lora_alpha=float(alpha),
            use_rslora=bool(data.get("use_rslora", False)),
            rank_pattern=dict(data.get("rank_pattern") or {}),
            alpha_pattern=dict(data.get("alpha_pattern") or {}),
            target_modules=data.get("target_modules"),
        )

    def rank(self, module: str) -> int:
        return int(_lookup(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732)."""
        alpha = float(_lookup(self.alpha_pattern, module, self.lora_alpha))
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether target_modules names the module, as peft matches it."""
        wanted = self.target_modules
        if wanted is None or wanted == "all-linear":
            return True
        if isinstance(wanted, str):
            return re.fullmatch(wanted, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in wanted)


def _lookup(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name (peft's rule)."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def load(directory: str | Path, config: LlamaConfig) -> AdapterWeights:
    """Reads an adapter for a base model, its scale folded into B.

    Raises:
        AdapterError: a file is missing or broken, the adapter is of a kind that is not served, or it does not fit the model.
    """
    directory = Path(directory)
    settings = read_config(directory)
    tensors = _read_tensors(directory)
    pairs: dict[tuple[int, str], dict[str, np.ndarray]] = {}
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
    weights: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]] = {}
    for where, pair in pairs.items():
        module = modules[where]
        if missing := {"A", "B"} - pair.keys():
            raise AdapterError(f"{module} has no lora_{missing.pop()}")
        if not settings.targets(module):
            raise AdapterError(f"{module} has weights, but target_modules ({settings.target_modules!r}) does not name it")
        a, b = pair["A"].astype(np.float32), pair["B"].astype(np.float32)
        rank = settings.rank(module)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise AdapterError(f"{module}: A is {list(a.shape)}, B {list(b.shape)}; the config says rank {rank}")
        if rank > MAX_RANK:
            raise AdapterError(f"{module}: rank is {rank}; allowed: 1 to {MAX_RANK}")
        weights[where] = (a, b * np.float32(settings.scale(module)))
    adapter = AdapterWeights(weights)
    try:
        adapter.check(config)
    except ValueError as error:
        raise AdapterError(f"{directory.name} does not fit the base model: {error}") from error
    return adapter


def read_config(directory: Path) -> PeftConfig:
    """Reads and checks adapter_config.json. Raises AdapterError."""
    file = directory / "adapter_config.json"
    if not file.is_file():
        raise AdapterError(f"{directory} has no adapter_config.json")
    try:
        data = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file.name} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise AdapterError(f"{file.name} holds a {type(data).__name__}; allowed: an object")
    return PeftConfig.from_json(data)


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    file = directory / "adapter_model.safetensors"
    if not file.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        hint = ": adapter_model.bin is pickled and is never opened, convert it to safetensors" if pickled else ""
        raise AdapterError(f"{directory} has no adapter_model.safetensors{hint}")
    try:
        return safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{file.name} cannot be read: {error}") from error


def save(
    directory: str | Path,
    tensors: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]],
    *,
    alpha: float,
    base_model: str,
    dtype: Any = np.float32,
) -> None:
    """Writes PEFT format that `peft` loads.

    Args:
        tensors: `(layer, target) -> (A [r, d_in], B [d_out, r])`, not scaled; all of one rank.
        alpha: updates are scaled by alpha / r.
        dtype: of the file.
    """
    ranks = {a.shape[0] for a, _ in tensors.values()}
    if len(ranks) != 1:
        raise ValueError(f"the matrices have the ranks {sorted(ranks)}; allowed: one")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    named = {}
    for (layer, target), pair in tensors.items():
        for side, matrix in zip("AB", pair):
            key = f"base_model.model.model.layers.{layer}.{_PARENT[target]}.{target}.lora_{side}.weight"
            named[key] = np.ascontiguousarray(matrix, dtype)
    safetensors.numpy.save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})
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
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2))
