"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, checked before anything changes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from chameleon_jax.checkpoints import patterns
from chameleon_jax.models.adapter_weights import AdapterWeights
from chameleon_jax.models.config import TARGETS, LlamaConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_RANK = 256
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 16 << 20
"""What a file of weights may take beside the weights: safetensors' header with names and metadata."""

_KEY = re.compile(
    r"^(?:base_model\.model\.)?(model\.layers\.(\d{1,6})\.(?:self_attn|mlp)\.(\w+))\.lora_([AB])(?:\.default)?\.weight$"
)
_PARENT = {t: "self_attn" if t in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp" for t in TARGETS}


class AdapterError(ValueError):
    """An adapter that cannot be served; the text says what and why."""


_REFUSED = {
    "use_dora": "DoRA rescales the base weights, which requests share",
    "lora_bias": "biases are not served",
    "modules_to_save": "it replaces whole modules, which requests share",
    "trainable_token_indices": "it replaces embeddings, which requests share",
    "fan_in_fan_out": "the base model's matrices are not transposed",
    "layer_replication": "it changes the base model's layers",
    "target_parameters": "only linear layers are adapted",
    "alora_invocation_tokens": "an activated LoRA changes only what follows certain tokens",
    "use_qalora": "its A works on pooled inputs",
    "use_bdlora": "its matrices are block-diagonal",
    "arrow_config": "it mixes several adapters",
    "kasa_config": "it truncates the base weights, which requests share",
    "monteclora_config": "it draws its weights at random",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_INTEGERS = {f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What of adapter_config.json decides the weights' meaning."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    target_modules: str | Sequence[str] | None = None
    layers_to_transform: Sequence[int] = ()

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PeftConfig:
        """Raises AdapterError, naming the field, where the adapter is not a plain LoRA."""
        kind = str(data.get("peft_type", "LORA")).upper()
        if kind != "LORA":
            raise AdapterError(f"peft_type is {kind!r}; allowed: LORA")
        for field, why in _REFUSED.items():
            if data.get(field):
                raise AdapterError(f"{field} is {data[field]!r}: {why}")
        if data.get("bias", "none") != "none":
            raise AdapterError(f"bias is {data['bias']!r}; allowed: 'none'")
        if str(initial := data.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
            raise AdapterError(
                f"init_lora_weights is {initial!r}: it changes the base weights, which requests share; "
                "peft's save_pretrained(path_initial_model_for_weight_conversion=...) writes a plain LoRA"
            )
        targets = data.get("target_modules")
        named = isinstance(targets, list) and all(isinstance(t, str) for t in targets)
        if not (targets is None or isinstance(targets, str) or named):
            raise AdapterError(f"target_modules is {targets!r}; allowed: a list of names, a pattern or 'all-linear'")
        layers = data.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers or []
        if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
            raise AdapterError(f"layers_to_transform is {layers!r}; allowed: a layer's number or a list of them")
        return cls(
            r=_rank("r", data.get("r")),
            lora_alpha=_alpha("lora_alpha", data.get("lora_alpha", 8)),
            use_rslora=bool(data.get("use_rslora", False)),
            rank_pattern={p: _rank(f"rank_pattern of {p}", r) for p, r in _patterns(data, "rank_pattern").items()},
            alpha_pattern={p: _alpha(f"alpha_pattern of {p}", a) for p, a in _patterns(data, "alpha_pattern").items()},
            target_modules=targets,
            layers_to_transform=layers,
        )

    def ranks(self, modules: Sequence[str]) -> dict[str, int]:
        """Of each module. Raises AdapterError where a pattern is none, or takes too long."""
        rank_of = _first_match("rank_pattern", self.rank_pattern, self.r, modules)
        return {module: int(rank_of(module)) for module in modules}

    def scales(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Of each module: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732). Raises as `ranks`."""
        alpha_of = _first_match("alpha_pattern", self.alpha_pattern, self.lora_alpha, list(ranks))
        return {m: float(alpha_of(m)) / (math.sqrt(r) if self.use_rslora else r) for m, r in ranks.items()}

    def targeted(self, modules: Sequence[str]) -> frozenset[str]:
        """Those that target_modules names, as peft matches them. Raises as `ranks`."""
        wanted = self.target_modules
        if wanted is None or wanted == "all-linear":
            return frozenset(modules)
        if isinstance(wanted, str):
            return _matches("target_modules", [wanted], modules, "%s")[wanted]
        endings = {"." + name for name in wanted}
        return frozenset(m for m in modules if m in wanted or any(m.endswith(ending) for ending in endings))


def _rank(field: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise AdapterError(f"{field} is {value!r}; allowed: 1 to {MAX_RANK}")
    return value


def _alpha(field: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise AdapterError(f"{field} is {value!r}; allowed: a finite number")
    return float(value)


def _patterns(data: dict[str, Any], field: str) -> dict[str, Any]:
    values = data.get(field) or {}
    if not isinstance(values, dict):
        raise AdapterError(f"{field} is {values!r}; allowed: an object")
    return values


def _first_match(field: str, values: Mapping[str, Any], default: Any, modules: Sequence[str]) -> Callable[[str], Any]:
    """The value of the first pattern that matches a module. peft's rule: from a dot of its name to the end."""
    found = _matches(field, list(values), modules, r"(.*\.)?(%s)$")
    return lambda module: next((value for pattern, value in values.items() if module in found[pattern]), default)


def _matches(field: str, named: list[str], modules: Sequence[str], form: str) -> dict[str, frozenset[str]]:
    try:
        return patterns.matches(named, modules, form)
    except ValueError as error:
        raise AdapterError(f"{field}: {error}") from error


def load(directory: str | Path, config: LlamaConfig) -> AdapterWeights:
    """Reads an adapter for a base model, its scale folded into B.

    Raises:
        AdapterError: a file is missing or broken, the adapter is of a kind that is not served, or it does not fit.
    """
    directory = Path(directory)
    settings = read_config(directory)
    tensors = _read_tensors(directory, config)
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
    names = list(modules.values())
    ranks, targeted = settings.ranks(names), settings.targeted(names)
    scales = settings.scales(ranks)
    weights: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]] = {}
    for where, pair in pairs.items():
        module = modules[where]
        if missing := {"A", "B"} - pair.keys():
            raise AdapterError(f"{module} has no lora_{missing.pop()}")
        layers = settings.layers_to_transform
        if module not in targeted or (layers and where[0] not in layers):
            named = f"target_modules ({settings.target_modules!r}) and layers_to_transform ({settings.layers_to_transform!r})"
            raise AdapterError(f"{module} has weights, but {named} do not name it")
        with np.errstate(over="ignore"):  # the check below finds what is not finite
            a, b = pair["A"].astype(np.float32), pair["B"].astype(np.float32)
        rank = ranks[module]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise AdapterError(f"{module}: A is {list(a.shape)}, B {list(b.shape)}; the config says rank {rank}")
        with np.errstate(over="ignore", invalid="ignore"):
            weights[where] = (a, b * np.float32(scales[module]))
    adapter = AdapterWeights(weights)
    try:
        adapter.check(config)
    except ValueError as error:
        raise AdapterError(f"{directory.name} does not fit the base model: {error}") from error
    return adapter


def read_config(directory: Path) -> PeftConfig:
    """Reads and checks adapter_config.json. Raises AdapterError."""
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise AdapterError(f"{directory.name} has no {CONFIG_FILE}")
    try:
        _check_size(file, MAX_CONFIG_BYTES)
        data = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file.name} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise AdapterError(f"{file.name} holds a {type(data).__name__}; allowed: an object")
    return PeftConfig.from_json(data)


def _check_size(file: Path, most: int) -> None:
    if (size := file.stat().st_size) > most:
        raise ValueError(f"it has {size} bytes; allowed: {most}")


def _read_tensors(directory: Path, config: LlamaConfig) -> dict[str, np.ndarray]:
    file = directory / WEIGHTS_FILE
    if not file.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        hint = ": adapter_model.bin is pickled and is never opened, convert it to safetensors" if pickled else ""
        raise AdapterError(f"{directory.name} has no {WEIGHTS_FILE}{hint}")
    widths = sum(sum(config.target_shape(target)) for target in TARGETS)
    try:
        _check_size(file, config.num_layers * widths * MAX_RANK * 8 + MAX_HEADER_BYTES)  # the largest that fits, in float64
        # not mapped: a training loop may write the file anew meanwhile, and what is cut off would end the process
        tensors = safetensors.deserialize(file.read_bytes())
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{file.name} cannot be read: {error}") from error
    return {name: _array(name, tensor) for name, tensor in tensors}


def _array(name: str, tensor: Mapping[str, Any]) -> np.ndarray:
    dtype = tensor["dtype"]
    if dtype not in _FLOATS:
        raise AdapterError(f"tensor {name} is of dtype {_INTEGERS.get(dtype, dtype)}; allowed: {', '.join(_FLOATS.values())}")
    return np.frombuffer(tensor["data"], jnp.dtype(_FLOATS[dtype])).reshape(tensor["shape"])


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
