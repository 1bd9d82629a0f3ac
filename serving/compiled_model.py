"""A base model with its page pool and compiled programs: the part of an engine that no restart changes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

import jax

from chameleon_jax.config import EngineConfig
from chameleon_jax.models import ops
from chameleon_jax.models.config import ALL_TARGETS, TARGETS
from chameleon_jax.models.page_layout import PageLayout
from chameleon_jax.models.runtime.buckets import StepBuckets, shapes_for
from chameleon_jax.models.runtime.compilation import Progress
from chameleon_jax.models.runtime.model_runner import HOST_POOL_BYTES, ModelRunner
from chameleon_jax.serving.loaded_model import LoadedModel
from chameleon_jax.serving.max_model_len import LengthLimits

logger = logging.getLogger(__name__)


class CompiledModel:
    """A base model that can run steps.

    Args:
        loaded: The model. Its weights belong to the runner from here on.
        config: Settings; sizes may be open.
        progress: Told how many programs are compiled.

    Attributes:
        layout: Geometry of a page.
        dtype: Type of the weights and of a page's elements.
        runner: Weights, pool and compiled programs.
        settings: Settings that programs are compiled for, every size filled in.

    Raises:
        ValueError: The configuration cannot be served; says why.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig, progress: Progress):
        self.layout = PageLayout.for_model(loaded.config, config.page_tokens, config.enable_lora_extras)
        self.dtype = loaded.dtype
        stats = jax.devices()[0].memory_stats()
        # the pool's size depends on scratch, scratch on block tables, and these on the longest sequence: it is chosen for
        # a pool that has no scratch beside it, and lowered once the pool is known
        limits = LengthLimits(
            config.max_model_len,
            loaded.config.max_position_embeddings,
            self.layout.page_tokens,
            self._adapter_pages(config),
            on_host=jax.default_backend() == "cpu",
        )
        most = limits.choose(config.num_pages or self._most_pages(stats))
        self.runner = ModelRunner(
            loaded.weights,
            self.layout,
            self._buckets(config, most.tokens),
            config.num_pages,
            self.dtype,
            progress,
            memory_limit=None if stats is None else stats["bytes_limit"],
            compile_programs=_when(config),
        )
        chosen = min(most, limits.choose(self.runner.num_pages))
        logger.info("max_model_len is %d: %s", *chosen)
        self._log_pool()
        self.settings = dataclasses.replace(config, max_model_len=chosen.tokens, num_pages=self.runner.num_pages)

    def _log_pool(self) -> None:
        pages, page_bytes = self.runner.num_pages, self.layout.page_bytes(self.dtype.itemsize)
        text = "the pool has %d pages: %d tokens of KV without adapters, %d MiB"
        logger.info(text, pages, (pages - 1) * self.layout.page_tokens, pages * page_bytes >> 20)

    def _most_pages(self, stats: Mapping[str, int] | None) -> int:
        """Pages that the device's memory would hold beside the weights, were there no scratch. Args: stats: of its memory."""
        free = HOST_POOL_BYTES if stats is None else stats["bytes_limit"] - stats["bytes_in_use"]
        return free // self.layout.page_bytes(self.dtype.itemsize)

    def _adapter_pages(self, config: EngineConfig) -> int:
        """Pages of the largest adapter that is served."""
        if not config.enable_lora:
            return 0
        targets, vectors = (ALL_TARGETS, TARGETS) if config.enable_lora_extras else (TARGETS, ())
        return self.layout.place(dict.fromkeys(targets, config.max_lora_rank), vectors).num_pages

    def _buckets(self, config: EngineConfig, max_model_len: int) -> StepBuckets:
        return StepBuckets(
            max_num_seqs=config.max_num_seqs,
            max_prefill_tokens=config.max_num_batched_tokens,
            table_width=self.layout.pages_for_tokens(max_model_len),
            max_rank=config.max_lora_rank,
            max_adapter_pages=self._adapter_pages(config),
            extras=config.enable_lora and config.enable_lora_extras,
            **shapes_for(ops.default_backend()),
        )


def _when(config: EngineConfig) -> str:
    """When programs are compiled. On a GPU the compiler tries kernels on the device, whose memory the pool has by then."""
    if config.compile_programs != "auto":
        return config.compile_programs
    return "background" if jax.default_backend() == "cpu" else "ahead"
