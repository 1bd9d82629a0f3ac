"""The engine behind `LLM` and `AsyncLLM`: built for them, or lent to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from chameleon_jax.config import EngineConfig
from chameleon_jax.serving.engine import LLMEngine


def compile_progress(done: int, total: int) -> None:
    """Print one line that counts compiled programs."""
    print(f"\rcompiling programs: {done}/{total}", end="" if done < total else "\n", flush=True)


def open_engine(
    model: str | LLMEngine, settings: Mapping[str, Any], progress: Callable[[int, int], None]
) -> tuple[LLMEngine, bool]:
    """Build an engine where `model` names one, else return it. The second value says whether it was built.

    Raises:
        ValueError: The model cannot be served, a setting is wrong, or settings are given beside an engine.
    """
    if isinstance(model, LLMEngine):
        if settings:
            raise ValueError(f"{', '.join(settings)}: allowed with a model's name; an engine that is built has its settings")
        return model, False
    return LLMEngine(str(model), EngineConfig.of(settings), progress=progress), True
