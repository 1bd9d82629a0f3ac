"""Engines that tests share. Building one takes seconds, restarting one for the next test milliseconds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chameleon_jax.config import COMPILED, EngineConfig
from chameleon_jax.models.runtime.programs import ProgramCache
from chameleon_jax.serving.engine import LLMEngine

SETTINGS: dict[str, Any] = dict(
    dtype="float32",
    max_model_len=128,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    num_pages=1200,
    max_queue_len=64,
    compile_programs="lazy",
)
"""Settings of an engine that a test borrows, where the test gives no others."""

SIZES = dict(max_num_seqs=32)
"""Sizes of engines that compile programs when steps need them, where larger ones cost nothing; a test may ask for as much."""


class Engines:
    """Engines by model and by the settings that a restart cannot change. A borrowed engine belongs to one test at a time."""

    def __init__(self) -> None:
        self._idle: dict[tuple[object, ...], list[LLMEngine]] = {}
        self._programs: dict[tuple[object, ...], list[ProgramCache]] = {}

    @contextlib.contextmanager
    def borrow(self, model: str | Path, **settings: Any) -> Iterator[LLMEngine]:
        """Lend an engine with no adapters, no requests, an empty pool and nothing learnt."""
        wanted = SETTINGS | settings
        fixed = {field: wanted[field] for field in (*COMPILED, "enable_lora") if field in wanted}
        if wanted["compile_programs"] == "ahead":
            fixed["max_num_seqs"] = wanted["max_num_seqs"]  # each size has programs of its own
        idle = self._idle.setdefault((str(model), *sorted(fixed.items())), [])
        engine = idle.pop() if idle else self._build(model, EngineConfig(**SETTINGS | SIZES | fixed))
        try:
            engine.restart()  # first with the executor that it was built with: an earlier test may have replaced it
            for name in engine.list_loras():
                engine.remove_lora(name)
            engine.restart(**wanted)
            yield engine
        except BaseException:
            engine.close()
            raise
        idle.append(engine)

    def _build(self, model: str | Path, config: EngineConfig) -> LLMEngine:
        """Build an engine. A lazy one shares the programs of those before it whose steps have the same shapes."""
        engine = LLMEngine(str(model), config)
        if config.compile_programs == "lazy":
            runner, programs = engine.runner, engine.runner.programs
            shapes = (runner.layout.config, runner.layout.page_elems, runner.buckets, runner.dtype, runner.num_pages)
            own = [programs.forward, programs.sample, programs.write, programs.count, programs.score]
            shared = self._programs.setdefault(shapes, own)
            programs.forward, programs.sample, programs.write, programs.count, programs.score = shared
        return engine

    def close(self) -> None:
        """Close every engine that is not lent."""
        for engine in (engine for engines in self._idle.values() for engine in engines):
            engine.close()
