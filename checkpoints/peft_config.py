"""adapter_config.json of a LoRA adapter in PEFT's format, read and checked."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chameleon_jax.checkpoints import patterns
from chameleon_jax.memory.adapters import MAX_RANK
from chameleon_jax.models.config import VOCABULARY_TARGETS

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_ERROR_LEN = 800
"""Most characters of an error's text, which may quote names and values from the adapter."""


class AdapterError(ValueError):
    """An adapter cannot be served; the text names the part and the reason."""

    def __init__(self, text: str):
        super().__init__(text if len(text) <= MAX_ERROR_LEN else text[:MAX_ERROR_LEN] + "…")


_REFUSED = {
    "fan_in_fan_out": "the base model's matrices are not transposed",
    "layer_replication": "it changes the base model's layers",
    "target_parameters": "only linear layers are adapted",
    "alora_invocation_tokens": "an activated LoRA changes only the text behind certain tokens",
    "use_qalora": "its A works on pooled inputs",
    "use_bdlora": "its matrices are block-diagonal",
    "arrow_config": "it mixes several adapters",
    "kasa_config": "it truncates the base weights, which requests share",
    "monteclora_config": "it draws its weights at random",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """Fields that decide the meaning of the weights. As in peft, null means the default, except for r and lora_alpha."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: Sequence[int] = ()
    use_dora: bool = False
    lora_bias: bool = False
    ensure_weight_tying: bool = False
    saved_modules: Sequence[str] = ()
    """Whole matrices of modules_to_save: "embed_tokens", "lm_head"."""
    trainable_tokens: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    """Trained tokens of "embed_tokens" and "lm_head"."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PeftConfig:
        """Check the fields; raise AdapterError, naming the field, where the adapter is not a plain LoRA."""
        kind = data.get("peft_type", "LORA")
        _require(str(kind).upper() == "LORA", "peft_type", kind, "LORA")
        for field, why in _REFUSED.items():
            if data.get(field):
                raise AdapterError(f"{field} is {reprlib.repr(data[field])}: {why}")
        # the matrices of a Llama have no biases of their own, which all the others would train
        _require(data.get("bias") in (None, "none", "all", "lora_only"), "bias", data.get("bias"), "'none', 'all', 'lora_only'")
        saved = [name.rpartition(".")[2] for name in _modules(data, "modules_to_save") or []]
        if not set(saved) <= set(VOCABULARY_TARGETS):
            raise AdapterError(
                f"modules_to_save is {reprlib.repr(data['modules_to_save'])}; allowed: {', '.join(VOCABULARY_TARGETS)}. Others "
                "are shared by requests: merge the adapter into its base model and serve that"
            )
        if _flag(data, "use_dora") and _flag(data, "lora_bias"):
            raise AdapterError("use_dora and lora_bias are True; allowed: one of them, as in peft")
        if str(initial := data.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
            raise AdapterError(
                f"init_lora_weights is {reprlib.repr(initial)}: it changes the base weights, which requests share; "
                "peft's save_pretrained(path_initial_model_for_weight_conversion=...) writes a plain LoRA"
            )
        return cls(
            r=_rank("r", data.get("r")),
            lora_alpha=_alpha("lora_alpha", data.get("lora_alpha", 8)),
            use_rslora=_flag(data, "use_rslora"),
            rank_pattern={p: _rank(f"rank_pattern of {p!r}", r) for p, r in _patterns(data, "rank_pattern")},
            alpha_pattern={p: _alpha(f"alpha_pattern of {p!r}", a) for p, a in _patterns(data, "alpha_pattern")},
            target_modules=_modules(data, "target_modules", ", or 'all-linear'"),
            exclude_modules=_modules(data, "exclude_modules"),
            layers_to_transform=_layers(data),
            use_dora=_flag(data, "use_dora"),
            lora_bias=_flag(data, "lora_bias"),
            ensure_weight_tying=_flag(data, "ensure_weight_tying"),
            saved_modules=saved,
            trainable_tokens=_trainable_tokens(data),
        )

    def ranks(self, modules: Sequence[str]) -> dict[str, int]:
        """Rank of each module; raise AdapterError where a pattern is invalid or takes too long."""
        rank_of = _first_match("rank_pattern", self.rank_pattern, self.r, modules)
        return {module: int(rank_of(module)) for module in modules}

    def scales(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Scale of each module: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732).

        Raises AdapterError as `ranks` does.
        """
        alpha_of = _first_match("alpha_pattern", self.alpha_pattern, self.lora_alpha, list(ranks))
        return {m: float(alpha_of(m)) / (math.sqrt(r) if self.use_rslora else r) for m, r in ranks.items()}

    def targeted(self, modules: Sequence[str]) -> frozenset[str]:
        """Modules that target_modules names and exclude_modules does not, as peft matches them.

        Raises AdapterError as `ranks` does.
        """
        wanted, excluded = self.target_modules, self.exclude_modules
        every = wanted is None or wanted == "all-linear"
        found = frozenset(modules) if every else _named("target_modules", wanted, modules)
        return found - _named("exclude_modules", excluded, modules) if excluded else found


def read_config(directory: Path) -> PeftConfig:
    """Read and check adapter_config.json; raise AdapterError where it is missing, broken or not served."""
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise AdapterError(f"{directory.name} has no {CONFIG_FILE}")
    try:
        if (size := file.stat().st_size) > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {size} bytes; allowed: {MAX_CONFIG_BYTES}")
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file.name} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise AdapterError(f"{file.name} holds a {type(data).__name__}; allowed: an object")
    return PeftConfig.from_json(data)


def _require(condition: bool, field: str, value: Any, allowed: str) -> None:
    if not condition:
        raise AdapterError(f"{field} is {reprlib.repr(value)}; allowed: {allowed}")


def _rank(field: str, value: Any) -> int:
    _require(type(value) is int and 1 <= value <= MAX_RANK, field, value, f"1 to {MAX_RANK}")
    return int(value)


def _flag(data: dict[str, Any], field: str) -> bool:
    value = data.get(field)
    _require(value is None or type(value) is bool, field, value, "true or false")
    return bool(value)


def _trainable_tokens(data: dict[str, Any]) -> dict[str, list[int]]:
    field = "trainable_token_indices"
    value = data.get(field) or {}
    found = value if isinstance(value, dict) else {"embed_tokens": value}
    named = {name.rpartition(".")[2]: tokens for name, tokens in found.items()}
    listed = all(isinstance(tokens, list) and all(type(token) is int for token in tokens) for tokens in named.values())
    _require(listed and named.keys() <= set(VOCABULARY_TARGETS), field, value, f"token ids, or those of {VOCABULARY_TARGETS}")
    return named


def _alpha(field: str, value: Any) -> float:
    _require(type(value) in (int, float) and abs(value) <= sys.float_info.max, field, value, "a finite number")
    return float(value)


def _patterns(data: dict[str, Any], field: str) -> Iterable[tuple[str, Any]]:
    values: dict[str, Any] = data.get(field) or {}
    _require(isinstance(values, dict), field, values, "an object")
    return values.items()


def _modules(data: dict[str, Any], field: str, more: str = "") -> str | list[str] | None:
    value: str | list[str] | None = data.get(field)
    listed = isinstance(value, list) and all(isinstance(name, str) for name in value)
    _require(value is None or isinstance(value, str) or listed, field, value, f"a list of names, a pattern{more}")
    return value


def _layers(data: dict[str, Any]) -> list[int]:
    value = data.get("layers_to_transform")
    layers = [] if value is None else value if isinstance(value, list) else [value]
    listed = all(type(layer) is int for layer in layers)
    _require(listed, "layers_to_transform", value, "a layer's number or a list of them")
    return layers


def _named(field: str, wanted: str | Sequence[str] | None, modules: Sequence[str]) -> frozenset[str]:
    if isinstance(wanted, str):
        return _matches(field, [wanted], modules, "%s")[wanted]
    names = frozenset(wanted or ())
    endings = tuple("." + name for name in names)
    return frozenset(m for m in modules if m in names or m.endswith(endings))


def _first_match(field: str, values: Mapping[str, Any], default: Any, modules: Sequence[str]) -> Callable[[str], Any]:
    """Make a function that finds the value of the first pattern that matches a module, from a dot of its name to the end."""
    found = _matches(field, list(values), modules, r"(.*\.)?(%s)$")
    return lambda module: next((value for pattern, value in values.items() if module in found[pattern]), default)


def _matches(field: str, named: list[str], modules: Sequence[str], form: str) -> dict[str, frozenset[str]]:
    try:
        return patterns.matches(named, modules, form)
    except ValueError as error:
        raise AdapterError(f"{field}: {error}") from error
