"""Configuration of a Llama-shaped model: sizes, rotary embedding, presets. Host-side values only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from chameleon_jax.checks import require
from chameleon_jax.models import hf_fields

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Matrices of a layer that a LoRA adapter may change, in the order in which their rows are packed."""
ATTENTION_TARGETS = TARGETS[:4]
"""Matrices of attention, to which most adapters keep."""
VOCABULARY_TARGETS = ("embed_tokens", "lm_head")
"""Matrices outside the layers that a LoRA adapter may change. Their side of the vocabulary is cut into as many parts as the
model has layers (`LlamaConfig.vocab_cut`), so that a page holds rows of them in every layer, as it does of other targets."""
ALL_TARGETS = TARGETS + VOCABULARY_TARGETS
"""Targets in the order in which their rows are packed."""


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
_HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "eos_token_ids": "eos_token_id",
}
"""Fields of `LlamaConfig` that a Hugging Face `config.json` calls otherwise."""


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Frequency scaling of Llama 3.1: low frequencies are slowed by `factor`, high ones kept, and those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        require(low < high, "high_freq_factor", high, f"above low_freq_factor ({low})")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama-shaped decoder. `head_dim * num_heads` need not equal `hidden_size`.

    Raises:
        ValueError: A size is out of range. The message names the field.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: Llama3RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in _SIZES:
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding needs an even one")

    @property
    def vocab_cut(self) -> int:
        """Tokens in one layer's part of VOCABULARY_TARGETS: a multiple of 16, so that the last part may be padded."""
        return -(-self.vocab_size // (16 * self.num_layers)) * 16

    def target_shape(self, target: str) -> tuple[int, int]:
        """Look up `(d_in, d_out)` of a target matrix, or of a layer's part of one, in elements."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        d, f = self.hidden_size, self.intermediate_size
        shapes = {
            "q_proj": (d, q),
            "k_proj": (d, kv),
            "v_proj": (d, kv),
            "o_proj": (q, d),
            "gate_proj": (d, f),
            "up_proj": (d, f),
            "down_proj": (f, d),
            "embed_tokens": (self.vocab_cut, d),
            "lm_head": (d, self.vocab_cut),
        }
        return shapes[target]

    @property
    def num_params(self) -> int:
        """Number of weights of the model, embeddings included."""
        layer = sum(i * o for i, o in map(self.target_shape, TARGETS)) + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> LlamaConfig:
        """Read a Hugging Face `config.json`.

        Raises:
            ValueError: The model is not Llama-shaped, is quantised, or needs a computation that is not served. The message
                names the field.
        """
        hf = hf_fields.checked(hf)
        rope = hf_fields.rope(hf)
        heads, hidden = hf_fields.integer(hf, "num_attention_heads"), hf_fields.integer(hf, "hidden_size")
        return cls(
            vocab_size=hf_fields.integer(hf, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=hf_fields.integer(hf, "intermediate_size"),
            num_layers=hf_fields.integer(hf, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=hf_fields.integer(hf, "num_key_value_heads", heads),
            head_dim=hf_fields.integer(hf, "head_dim", hidden // heads),
            rope_theta=rope["rope_theta"],
            rope_scaling=_rope_scaling(rope),
            rms_norm_eps=hf_fields.number(hf, "rms_norm_eps", 1e-6),
            max_position_embeddings=hf_fields.integer(hf, "max_position_embeddings", 2048),
            tie_word_embeddings=hf_fields.flag(hf, "tie_word_embeddings"),
            bos_token_id=next(iter(hf_fields.token_ids(hf, "bos_token_id")), None),
            eos_token_ids=hf_fields.token_ids(hf, "eos_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """Write the `config.json` that `from_hf` and transformers read back."""
        hf: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }
        hf |= {_HF_NAMES.get(field, field): value for field, value in vars(self).items()}
        hf["eos_token_id"] = list(self.eos_token_ids) or None
        if self.rope_scaling is None:
            del hf["rope_scaling"]
        else:
            hf["rope_scaling"] = {"rope_type": "llama3", **dataclasses.asdict(self.rope_scaling)}
        return hf


def _rope_scaling(rope: Mapping[str, float]) -> Llama3RopeScaling | None:
    if "factor" not in rope:
        return None
    factor, low, high, original = (rope[field] for field in hf_fields.LLAMA3_SCALING)
    return Llama3RopeScaling(factor, low, high, int(original))


_LLAMA1: dict[str, Any] = dict(vocab_size=32_000, head_dim=128, rms_norm_eps=1e-6, bos_token_id=1, eos_token_ids=(2,))

PRESETS: dict[str, LlamaConfig] = {
    "tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        bos_token_id=1,
        eos_token_ids=(2,),
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=100_000.0,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
    ),
    "llama-7b": LlamaConfig(
        hidden_size=4096, intermediate_size=11_008, num_layers=32, num_heads=32, num_kv_heads=32, **_LLAMA1
    ),
    "llama-13b": LlamaConfig(
        hidden_size=5120, intermediate_size=13_824, num_layers=40, num_heads=40, num_kv_heads=40, **_LLAMA1
    ),
    "llama-30b": LlamaConfig(
        hidden_size=6656, intermediate_size=17_920, num_layers=60, num_heads=52, num_kv_heads=52, **_LLAMA1
    ),
    "llama-3-8b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=500_000.0,
        max_position_embeddings=8192,
        bos_token_id=128_000,
        eos_token_ids=(128_001, 128_009),
    ),
}
