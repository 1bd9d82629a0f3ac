"""Typed clients of the gRPC API. They need grpcio and protobuf, but no JAX and no model."""

from chameleon_jax.serving.client.async_client import AsyncClient
from chameleon_jax.serving.client.calls import Generated
from chameleon_jax.serving.client.sync_client import Client

__all__ = ["AsyncClient", "Client", "Generated"]
