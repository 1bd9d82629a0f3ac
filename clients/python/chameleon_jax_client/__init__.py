"""Typed clients of a chameleon-jax server's gRPC API, without JAX.

The other modules are copied from `chameleon_jax` when the package is built. They have a name of their own, so that this package
and the whole one can be installed side by side, in any two versions.
"""

from chameleon_jax_client import errors
from chameleon_jax_client.outputs import Logprob
from chameleon_jax_client.sampling_params import SamplingParams
from chameleon_jax_client.serving.client import AsyncClient, Client, Generated

__all__ = ["AsyncClient", "Client", "Generated", "Logprob", "SamplingParams", "errors"]
