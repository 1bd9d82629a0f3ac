from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.models.ops.linear import linear

WEIGHT = np.random.default_rng(0).standard_normal((24, 40)).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 40), (2, 40), (3, 7, 40), (256, 40), (257, 40), (40,)])
def test_every_form_is_the_product(shape):
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    np.testing.assert_allclose(jax.jit(linear)(x, WEIGHT), x @ WEIGHT.T, rtol=1e-5, atol=1e-5)


def test_output_dtype():
    x, weight = jnp.ones((4, 40), jnp.bfloat16), jnp.asarray(WEIGHT, jnp.bfloat16)
    assert linear(x, weight).dtype == jnp.bfloat16
    assert linear(x, weight, jnp.dtype("float32")).dtype == jnp.float32


def test_gradient():
    x = jnp.ones((4, 40))
    gradient = jax.grad(lambda x: linear(x, jnp.asarray(WEIGHT)).sum())(x)
    np.testing.assert_allclose(gradient, np.tile(WEIGHT.sum(0), (4, 1)), rtol=1e-5)
