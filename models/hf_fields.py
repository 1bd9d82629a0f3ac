"""Fields of a Hugging Face config.json, read with their types. A field that would change the answer unnoticed is refused."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from chameleon_jax.checks import require

Fields = Mapping[str, Any]

_ARCHITECTURES = {"LlamaForCausalLM": "llama", "LLaMAForCausalLM": "llama", "MistralForCausalLM": "mistral"}
_MISTRAL = {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
"""Defaults of transformers for a Mistral that differ from those for a Llama."""

_QUANTISED = ("quantization_config", "compression_config", "quantization")
_NEUTRAL: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_out_bias": False,
    "qkv_bias": False,
    "mlp_bias": False,
    "use_qk_norm": False,
    "partial_rotary_factor": 1.0,
    "rotary_pct": 1.0,
    "rope_interleaved": False,
    "no_rope_layers": None,
    "alibi": False,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": None,
    "query_pre_attn_scalar": None,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "scale_emb": 1.0,
    "scale_depth": None,
    "dim_model_base": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "clip_qkv": None,
    "attn_temperature_tuning": False,
    "attention_chunk_size": None,
    "is_causal": True,
    "use_bidirectional_attention": False,
    "use_parallel_residual": False,
    "parallel_attn": False,
    "num_experts": 0,
    "num_local_experts": 0,
}
"""The one value of each field, beside null, that agrees with the layers here."""

LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *LLAMA3_SCALING)


def checked(hf: Fields) -> dict[str, Any]:
    """Check that the model is Llama-shaped, and fill in its family's defaults.

    Raises:
        ValueError: It is not, or its weights are quantised. The message names the field.
    """
    architectures = hf.get("architectures") or []
    names = architectures if isinstance(architectures, list) else [architectures]
    require(all(name in list(_ARCHITECTURES) for name in names), "architectures", architectures, ", ".join(_ARCHITECTURES))
    family = hf.get("model_type") or (_ARCHITECTURES[names[0]] if names else "llama")
    families = list(dict.fromkeys(_ARCHITECTURES.values()))
    require(family in families, "model_type", family, ", ".join(families))
    for field, method in _quantised(hf):
        raise ValueError(
            f"{field} says that the weights are quantised (quant_method {reprlib.repr(method)}), which is not served; "
            "allowed: weights in float16, bfloat16, float32 or float64, or a GGUF file"
        )
    for field, neutral in _NEUTRAL.items():
        value = hf.get(field)
        require(value is None or value == neutral, field, value, "null" if neutral is None else repr(neutral))
    layer_types = hf.get("layer_types") or []
    full = isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)
    require(full, "layer_types", layer_types, "full_attention for each layer")
    hf = {**(_MISTRAL if family == "mistral" else {}), **hf}
    longest = integer(hf, "max_position_embeddings", 2048)
    # a text within the window attends to all of itself, as the layers here do
    return hf | {"max_position_embeddings": min(longest, integer(hf, "sliding_window", longest))}


def rope(hf: Fields) -> dict[str, float]:
    """Read the fields of the rotary embedding: rope_theta, and LLAMA3_SCALING where it is scaled.

    Raises:
        ValueError: A field has a value that is not served, or two fields contradict each other.
    """
    # transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling
    given = {name: _one_rope(name, hf[name]) for name in ("rope_parameters", "rope_scaling") if hf.get(name)}
    scalings = [{field: rope.get(field) for field in ("rope_type", *LLAMA3_SCALING)} for rope in given.values()]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise ValueError("rope_parameters and rope_scaling differ; allowed: one of them, or both alike")
    fields = {"rope_theta": hf.get("rope_theta")}
    for rope in given.values():
        fields |= {field: value for field, value in rope.items() if value is not None}
    scaling = LLAMA3_SCALING if fields.get("rope_type") == "llama3" else ()
    return {"rope_theta": number(fields, "rope_theta", 10_000.0)} | {field: number(fields, field) for field in scaling}


def _one_rope(name: str, value: Any) -> dict[str, Any]:
    require(isinstance(value, dict), name, value, "an object")
    kinds = sorted({str(value[field]) for field in ("rope_type", "type") if value.get(field) is not None}) or ["default"]
    if kinds not in (["default"], ["llama3"]):
        raise ValueError(f"{name} type is {', '.join(map(reprlib.repr, kinds))}; allowed: default, llama3")
    if unknown := sorted(str(field) for field in value if field not in _ROPE and value[field] is not None):
        raise ValueError(f"{name} has the field {reprlib.repr(unknown[0])}; allowed: {', '.join(_ROPE)}")
    partial = value.get("partial_rotary_factor")
    require(partial in (None, 1), "partial_rotary_factor", partial, "1.0")
    return {**value, "rope_type": kinds[0]}


def integer(hf: Fields, field: str, default: int | None = None) -> int:
    """Read an integer from 1.

    Raises:
        ValueError: The field has another value, or is missing and has no default.
    """
    value = _value(hf, field, default)
    require(type(value) is int and value >= 1, field, value, "an integer from 1")
    return value


def number(hf: Fields, field: str, default: float | None = None) -> float:
    """Read a finite number above 0.

    Raises:
        ValueError: The field has another value, or is missing and has no default.
    """
    value = _value(hf, field, default)
    require(type(value) in (int, float) and 0 < value < math.inf, field, value, "a finite number above 0")
    return float(value)


def flag(hf: Fields, field: str) -> bool:
    """Read true or false; a missing field is false.

    Raises:
        ValueError: The field has another value.
    """
    value = _value(hf, field, False)
    require(type(value) is bool, field, value, "true or false")
    return value


def token_ids(hf: Fields, field: str) -> tuple[int, ...]:
    """Read one token id, several or none.

    Raises:
        ValueError: The field has another value.
    """
    value = hf.get(field)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    require(all(type(token) is int for token in ids), field, value, "a token id, a list of them, or null")
    return tuple(ids)


def _value(hf: Fields, field: str, default: Any) -> Any:
    value = hf.get(field)
    if value is None and default is None:
        raise ValueError(f"config.json has no field {field}")
    return default if value is None else value


def _quantised(hf: Fields) -> Iterator[tuple[str, Any]]:
    """Find the fields that describe a quantisation, with its method, here and one level deeper (as in text_config)."""
    parts = [("", hf), *((f"{name}.", part) for name, part in hf.items() if isinstance(part, dict))]
    for path, part in parts:
        for field in _QUANTISED:
            if value := part.get(field):
                yield path + field, value.get("quant_method") if isinstance(value, dict) else value
