"""The part of Pallas Triton that the kernels use, in one place: it is deprecated, and what replaces it will replace this.

Kernels get whole arrays as refs, load by index arrays and mask what does not exist. All extents of a tile are powers of two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

program_id = pl.program_id
when = pl.when
Index = tuple[Any, ...]


def call(
    kernel: Callable[..., None],
    out_shape: Any,
    *,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    name: str,
    interpret: bool,
    aliases: dict[int, int] | None = None,
) -> Callable[..., Any]:
    """A launch of `kernel` whose refs are the whole arguments and results.

    Args:
        aliases: argument -> result that takes its place in memory.
    """
    anywhere = pl.BlockSpec(memory_space=pl.ANY)

    # jax 0.11 warns when the program around the call is lowered, after the call has returned
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

    def run(*arguments: jax.Array) -> Any:
        return pl.pallas_call(
            kernel,
            out_shape,
            grid=grid,
            in_specs=[anywhere] * len(arguments),
            out_specs=jax.tree.map(lambda _: anywhere, out_shape),
            input_output_aliases=aliases or {},
            compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
            interpret=interpret,
            name=name,
        )(*arguments)

    return run


def load(ref: Any, index: Index, mask: Any = None, other: float | int | None = None) -> jax.Array:
    """Elements at `index`, a tuple of scalars and arrays that broadcast; `other` where the mask is False."""
    index, shape = _arrays(index)
    if mask is None:
        return plgpu.load(ref.at[index])
    return plgpu.load(ref.at[index], mask=jnp.broadcast_to(mask, shape), other=other)


def store(ref: Any, index: Index, value: jax.Array, mask: Any = None) -> None:
    index, shape = _arrays(index)
    plgpu.store(ref.at[index], value, mask=None if mask is None else jnp.broadcast_to(mask, shape))


def _arrays(index: Index) -> tuple[Index, tuple[int, ...]]:
    """The index without Python numbers, which interpret mode does not take, and its shape."""
    index = tuple(jnp.asarray(i, jnp.int32) for i in index)
    return index, jnp.broadcast_shapes(*(i.shape for i in index))


def dot(a: jax.Array, b: jax.Array, *, transpose_b: bool = False) -> jax.Array:
    """Product `[m, n]` float32 of `a [m, k]` and `b [k, n]`, or `[n, k]`; float32 operands are not rounded to tf32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, trans_b=transpose_b, precision=exact)


def multiple_of(value: jax.Array, divisor: int) -> jax.Array:
    """`value`, of which the compiler may know that `divisor` divides every element: it decides how wide loads are."""
    return pl.multiple_of(value, divisor)


def pick(values: Sequence[Any], place: jax.Array) -> Any:
    """`values[place]` of a few integers."""
    picked = jnp.int32(values[0])
    for i, value in enumerate(values[1:], 1):
        picked = jnp.where(place >= i, jnp.int32(value), picked)
    return picked


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
