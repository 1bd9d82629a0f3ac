"""Low-rank updates of many adapters in one batch, their rows read from the page pool."""

from chameleon_jax.models.ops.batched_lora.api import BACKENDS, batched_lora
from chameleon_jax.models.ops.batched_lora.plan import (
    BLOCK_ROWS,
    DECODE_WINDOW,
    LoraPlan,
    LoraTargets,
    fill_plan,
    plan_batch,
    plan_shapes,
    resolve,
    window_tiles,
)

__all__ = [
    "BACKENDS",
    "BLOCK_ROWS",
    "DECODE_WINDOW",
    "LoraPlan",
    "LoraTargets",
    "batched_lora",
    "fill_plan",
    "plan_batch",
    "plan_shapes",
    "resolve",
    "window_tiles",
]
