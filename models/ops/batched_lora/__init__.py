"""Low-rank updates of many adapters in one batch, their rows read from the page pool."""

from chameleon_jax.models.ops.batched_lora.api import BACKENDS, batched_lora

__all__ = ["BACKENDS", "batched_lora"]
