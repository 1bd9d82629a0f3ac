"""Many-adapter LLM serving on JAX. The public names are loaded when first used, so that importing the package is cheap."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chameleon_jax.config import EngineConfig
    from chameleon_jax.outputs import RequestOutput
    from chameleon_jax.sampling_params import LoRAMix, LoRARequest, SamplingParams
    from chameleon_jax.serving.async_llm import AsyncLLM
    from chameleon_jax.serving.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "EngineConfig", "LoRAMix", "LoRARequest", "RequestOutput", "SamplingParams"]

_HOME = {
    "AsyncLLM": "chameleon_jax.serving.async_llm",
    "LLM": "chameleon_jax.serving.llm",
    "EngineConfig": "chameleon_jax.config",
    "LoRAMix": "chameleon_jax.sampling_params",
    "LoRARequest": "chameleon_jax.sampling_params",
    "RequestOutput": "chameleon_jax.outputs",
    "SamplingParams": "chameleon_jax.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
