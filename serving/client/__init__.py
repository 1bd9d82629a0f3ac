"""Typed clients of the gRPC API. They need no JAX and no model, only grpcio."""

from chameleon_jax.serving.client.async_client import AsyncClient
from chameleon_jax.serving.client.channel import Generated
from chameleon_jax.serving.client.sync_client import Client

__all__ = ["AsyncClient", "Client", "Generated"]
