"""Settings of an engine: one frozen value, checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Mapping
from typing import Any, TypedDict, get_args, get_type_hints

from chameleon_jax.checks import require, require_field
from chameleon_jax.memory.adapters import MAX_RANK
from chameleon_jax.systems import System, get_system

COMPILED = ("dtype", "load_format", "page_tokens", "gpu_memory_utilization", "compile_programs", "enable_lora_extras")
"""Settings that a restart of the engine cannot change."""
LIMITS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_lora_rank", "num_pages", "enable_lora")
"""Settings that a restart can lower: programs are compiled for their first values."""


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine.

    Attributes:
        dtype: type of weights and page pool: "float32", "bfloat16", or "auto" (default), which is float32 on CPU and bfloat16
            on other devices.
        load_format: "auto" (default) reads the checkpoint; "dummy" draws random weights on the device.
        generation_config: source of sampling parameters that a request leaves out. "auto" (default) is the model's
            generation_config.json; "none", or "vllm" as in vLLM, is no file; any other value is a directory with such a file.
        max_model_len: longest sequence, prompt and output together, in tokens. None (default): the model's limit, or as much as
            the pool holds beside the largest adapter; on CPU at most 2048.
        max_num_seqs: most requests that run at once, 1 to 1024 (default 32).
        max_num_batched_tokens: most prompt tokens of one step, a multiple of 32 (default 512). The step's decode rows do not
            count. Longer prompts are computed in chunks.
        max_lora_rank: largest adapter rank that is served, 1 to 512 (default 256).
        lora_host_bytes: bytes of host memory for adapters in the pool's format (default 4 GiB). Adapters beyond it are kept on
            disk.
        num_pages: pages of the device pool, 2 or more. None (default): all memory within gpu_memory_utilization. On CPU: enough
            for every running request at full length, plus half as much, or the largest adapter, for adapters; 2 GiB at most.
        gpu_memory_utilization: share of the device's memory for weights, pool and scratch, in (0, 1] (default 0.9).
        page_tokens: least tokens of a page (default 16).
        enable_lora: False compiles no adapter programs and refuses adapters (default True).
        enable_lora_extras: True serves adapters with more than LoRA on the layers' matrices: LoRA on embed_tokens and lm_head,
            DoRA, and biases of LoRA. It compiles a further program for each size of a step (default False).
        compile_programs: "ahead" compiles every program before the first request. "background" compiles a few large ones, which
            serve requests while the others are compiled; no request waits for them. "lazy" compiles a program when a step first
            needs it: the engine starts in seconds, and all requests wait while a program compiles. "auto" (default) is
            "background" on CPU and "ahead" on other devices. No GPU has run "background" or "lazy"; without num_pages a GPU's
            largest programs are compiled at the start even so, to measure memory.
        system: policies that serve: a name in `systems.SYSTEMS` (default "chameleon-plus"), or a `systems.System`.
        ttft_slo: target for the time to first token, in seconds (default 5).
        tbt_slo: target for the time between tokens, in seconds (default 0.15).
        predicted_output_len: output tokens predicted for a request before any has ended (default 128). A request may exceed
            them.
        length_proxy: directory of a length proxy, trained by `chameleon-jax train-length-proxy`, that predicts output lengths
            from prompts. None (default): output lengths are predicted from each adapter's past requests.
        max_queue_len: most requests that may wait to start; further ones are refused. None (default): no limit.
        seed: seed from which requests without a seed of their own draw theirs (default 0).
    """

    dtype: str = "auto"
    load_format: str = "auto"
    generation_config: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_lora_rank: int = 256
    lora_host_bytes: int = 4 << 30
    num_pages: int | None = None
    gpu_memory_utilization: float = 0.9
    page_tokens: int = 16
    enable_lora: bool = True
    enable_lora_extras: bool = False
    compile_programs: str = "auto"
    system: str | System = "chameleon-plus"
    ttft_slo: float = 5.0
    tbt_slo: float = 0.15
    predicted_output_len: int = 128
    length_proxy: str | None = None
    max_queue_len: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        named = {
            "dtype": ("auto", "float32", "bfloat16"),
            "load_format": ("auto", "dummy"),
            "compile_programs": ("auto", "ahead", "background", "lazy"),
        }
        for field, names in named.items():
            require_field(self, field, getattr(self, field) in names, ", ".join(names))
        for field in ("max_model_len", "max_queue_len"):
            require_field(self, field, getattr(self, field) is None or getattr(self, field) >= 1, "1 or more")
        for field in ("page_tokens", "predicted_output_len"):
            require_field(self, field, getattr(self, field) >= 1, "1 or more")
        for field in ("ttft_slo", "tbt_slo"):
            require_field(self, field, 0 < getattr(self, field) < math.inf, "above 0 seconds, finite")
        tokens = self.max_num_batched_tokens
        require_field(self, "max_num_batched_tokens", tokens >= 32 and tokens % 32 == 0, "a multiple of 32")
        require_field(self, "max_num_seqs", 1 <= self.max_num_seqs <= 1024, "1 to 1024")
        require_field(self, "max_lora_rank", 1 <= self.max_lora_rank <= MAX_RANK, f"1 to {MAX_RANK}")
        require_field(self, "lora_host_bytes", self.lora_host_bytes >= 0, "0 or more")
        require_field(self, "num_pages", self.num_pages is None or self.num_pages >= 2, "2 or more")
        require_field(self, "gpu_memory_utilization", 0 < self.gpu_memory_utilization <= 1, "above 0, at most 1")
        get_system(self.system)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> EngineConfig:
        """Make a configuration of settings by name.

        Raises:
            ValueError: A setting is unknown or wrong; names it, and the setting whose name is nearest to an unknown one.
        """
        types = get_type_hints(cls)
        for name, value in settings.items():
            if name not in types:
                nearest = difflib.get_close_matches(name, types, 1)
                hint = f"did you mean {nearest[0]!r}? " if nearest else ""
                raise ValueError(f"unknown setting {name!r}; {hint}allowed: {', '.join(sorted(types))}")
            allowed = getattr(types[name], "__name__", None) or str(types[name])
            require(_is_of_type(value, types[name]), name, value, allowed)
        return cls(**settings)

    def check_restart(self, built: EngineConfig) -> None:
        """Check that an engine can serve with these settings over programs that were compiled for others.

        Args:
            built: Settings that the programs were compiled for, every size filled in.

        Raises:
            ValueError: A setting of COMPILED differs, or one of LIMITS is larger.
        """
        for field in COMPILED:
            value, limit = getattr(self, field), getattr(built, field)
            require(value == limit, field, value, f"{limit!r}, for which this engine was built")
        for field in LIMITS:
            value, limit = getattr(self, field), getattr(built, field)
            allowed = f"at most {limit!r}, for which this engine was built"
            require(value is not None and value <= limit, field, value, allowed)


def _is_of_type(value: object, hint: Any) -> bool:
    """Whether a value has a setting's type. Integers are numbers too, and truth values are not."""
    kinds = get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in kinds
    numeric = (int in kinds and isinstance(value, numbers.Integral)) or (float in kinds and isinstance(value, numbers.Real))
    return numeric or isinstance(value, kinds)


class EngineSettings(TypedDict, total=False):
    """Fields of `EngineConfig` as keyword arguments, so that type checkers find a misspelt or wrong one."""

    dtype: str
    load_format: str
    generation_config: str
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    max_lora_rank: int
    lora_host_bytes: int
    num_pages: int | None
    gpu_memory_utilization: float
    page_tokens: int
    enable_lora: bool
    enable_lora_extras: bool
    compile_programs: str
    system: str | System
    ttft_slo: float
    tbt_slo: float
    predicted_output_len: int
    length_proxy: str | None
    max_queue_len: int | None
    seed: int
