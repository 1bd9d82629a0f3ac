"""Attention over the page pool."""

from chameleon_jax.models.ops.paged_attention.api import BACKENDS, paged_attention, write_kv

__all__ = ["BACKENDS", "paged_attention", "write_kv"]
