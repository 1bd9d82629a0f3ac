"""The part of Pallas Triton that the kernels use, in one place: it is deprecated, and its successor needs a change here only.

Kernels get whole arrays as refs, load by index arrays, and mask elements that do not exist. All extents of a tile are powers of
two.

A kernel must not use the first extent of its arrays, in which batches of different sizes differ. So one translation to Triton's
code serves all of them. Tracing and lowering a kernel takes 30 to 110 ms of processor time, and a server of a 7B has some 200
launches to compile that differ in nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.extend.mlir import ir

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Shaped

program_id = pl.program_id
when = pl.when
Index = tuple[Any, ...]
Shape = tuple[tuple[int, ...], str]
"""Extents and dtype."""

TARGET = "__gpu$xla.gpu.triton"
"""XLA's name for a launch of Triton code."""
ANY_GRID = (1 << 30, 2, 2)
"""Grid for which a kernel is translated. Pallas takes the first program number modulo the grid's first extent, which must
therefore be above that of all launches; an extent of 1 would make a program number constant."""
LARGE_BYTES = 1 << 31
"""Arrays from this size on keep their first extent: it decides whether offsets have 64 bits."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel with everything that its code depends on, in a process with one kind of GPU and one configuration of JAX.

    Attributes:
        function: Body, which takes the refs of the whole arguments and results, and `static` as keywords.
        static: Names and values of keywords.
        num_warps: Warps of a program.
        num_stages: Stages of Triton's pipeline for loads.
        name: Name in profiles.
        aliases: `(argument, result)` that share memory.
        inputs: Arguments as the code sees them; `call` fills them in.
        outputs: Results as the code sees them; `call` fills them in.
    """

    function: Callable[..., None]
    static: tuple[tuple[str, Hashable], ...]
    num_warps: int
    num_stages: int
    name: str
    aliases: tuple[tuple[int, int], ...] = ()
    inputs: tuple[Shape, ...] = ()
    outputs: tuple[Shape, ...] = ()

    def call(self, *arguments: Shaped[Array, "..."], out_shape: Any, grid: tuple[int, ...], interpret: bool) -> Any:
        """Launch the kernel.

        Args:
            arguments: Arrays.
            out_shape: Pytree of the results' shapes and dtypes.
            grid: Programs along each axis, three at most.
            interpret: Run without a GPU.

        Returns:
            Pytree of the results.
        """
        outputs, tree = jax.tree.flatten(out_shape)
        made = dataclasses.replace(self, inputs=tuple(map(_seen, arguments)), outputs=tuple(map(_seen, outputs)))
        code = None if interpret else _code(made)
        if code is None:
            results = made.launch(grid, outputs, interpret)(*arguments)
        else:
            x, y, z = (*grid, 1, 1)[:3]
            launch = jax.ffi.ffi_call(TARGET, outputs, input_output_aliases=dict(made.aliases))
            results = launch(*arguments, **code | {"grid_x": np.int32(x), "grid_y": np.int32(y), "grid_z": np.int32(z)})
        return jax.tree.unflatten(tree, results)

    def launch(self, grid: tuple[int, ...], outputs: Sequence[jax.ShapeDtypeStruct], interpret: bool = False) -> Any:
        """Make a Pallas call, for arrays of any first extent."""
        anywhere = pl.BlockSpec(memory_space=pl.ANY)
        # jax 0.11 warns when the program around the call is lowered, after the call has returned
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return pl.pallas_call(
            functools.partial(self.function, **dict(self.static)),
            list(outputs),
            grid=grid,
            in_specs=[anywhere] * len(self.inputs),
            out_specs=[anywhere] * len(outputs),
            input_output_aliases=dict(self.aliases),
            compiler_params=plgpu.CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages),
            interpret=interpret,
            name=self.name,
        )


def _seen(array: Any) -> Shape:
    """Describe an array as a kernel's code sees it."""
    size = math.prod(array.shape) * array.dtype.itemsize
    return ((array.shape[0] if size >= LARGE_BYTES else 1, *array.shape[1:]), array.dtype.name)


_lock = threading.Lock()
_codes: dict[Kernel, dict[str, Any] | None] = {}


def _code(kernel: Kernel) -> dict[str, Any] | None:
    """Look up the launch's attributes, Triton's code among them. None where this jax launches Triton in another way."""
    with _lock:  # programs are traced on many threads; the interpreter's lock lets one run at a time anyway
        if kernel not in _codes:
            _codes[kernel] = _translate(kernel)
        return _codes[kernel]


@contextlib.contextmanager
def fresh_codes() -> Iterator[None]:
    """Translate every kernel anew inside, and forget these translations at the end: for measurements with changed constants.

    A kernel's body may read a constant that is not in `Kernel.static`. An earlier translation then has the old value.
    """
    global _codes
    with _lock:
        before, _codes = _codes, {}
    try:
        yield
    finally:
        with _lock:
            _codes = before


def _translate(kernel: Kernel) -> dict[str, Any] | None:
    inputs, outputs = ([jax.ShapeDtypeStruct(*shape) for shape in side] for side in (kernel.inputs, kernel.outputs))
    lowered = jax.jit(kernel.launch(ANY_GRID, outputs)).trace(*inputs).lower(lowering_platforms=("cuda",))
    found: list[dict[str, Any]] = []

    def visit(operation: Any) -> Any:
        attributes = operation.attributes
        if operation.name == "stablehlo.custom_call" and attributes["call_target_name"].value == TARGET:
            config = attributes["mhlo.backend_config" if "mhlo.backend_config" in attributes else "backend_config"]
            found.append({attribute.name: _value(attribute.attr) for attribute in config})
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return found[0] if found else None


def _value(attribute: Any) -> Any:
    """Convert an attribute to the form that `ffi_call` takes. All integers have 32 bits."""
    if isinstance(attribute, ir.StringAttr):
        return attribute.value_bytes  # the code is not text
    return attribute.value if isinstance(attribute, ir.BoolAttr) else np.int32(attribute.value)


def load(ref: Any, index: Index, mask: Any = None, other: float | int | None = None) -> Shaped[Array, "..."]:
    """Load the elements at `index`, a tuple of scalars and arrays that broadcast. `other` stands where the mask is False."""
    index, shape = _arrays(index)
    if mask is None:
        return plgpu.load(ref.at[index])
    return plgpu.load(ref.at[index], mask=_wide(mask, shape), other=other)


def store(ref: Any, index: Index, value: Shaped[Array, "..."], mask: Any = None) -> None:
    """Store a value of the shape that `index` broadcasts to, where the mask is True."""
    index, shape = _arrays(index)
    plgpu.store(ref.at[index], value, mask=None if mask is None else _wide(mask, shape))


def _arrays(index: Index) -> tuple[Index, tuple[int, ...]]:
    """Replace the Python numbers of an index, which interpret mode does not take, and compute its shape."""
    index = tuple(i if isinstance(i, jax.Array) else jnp.int32(i) for i in index)
    return index, np.broadcast_shapes(*(i.shape for i in index))


def _wide(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return mask if mask.shape == shape else jnp.broadcast_to(mask, shape)


def dot(a: Float[Array, "rows _"], b: Float[Array, "_ _"], *, transpose_b: bool = False) -> Float[Array, "rows _"]:
    """Multiply to float32 by `b [k, n]`, or `[n, k]` if it is transposed. Float32 operands are not rounded to tf32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, trans_b=transpose_b, precision=exact)


def multiple_of(value: Int[Array, "*batch"], divisor: int) -> Int[Array, "*batch"]:
    """Tell the compiler that `divisor` divides every element of `value`, which decides how wide loads are."""
    return pl.multiple_of(value, divisor)


def pick(values: Sequence[Any], place: Int[Array, ""]) -> Any:
    """Select `values[place]` among a few integers."""
    picked = jnp.int32(values[0])
    for i, value in enumerate(values[1:], 1):
        picked = jnp.where(place >= i, jnp.int32(value), picked)
    return picked


def ceil_div(a: int, b: int) -> int:
    """Divide and round up."""
    return -(-a // b)
