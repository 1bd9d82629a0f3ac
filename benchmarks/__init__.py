"""Benchmarks of chameleon-jax: `python -m benchmarks` lists them."""
