"""Kernels are translated once for batches of all sizes: the code must equal a translation for each size."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.mlir import ir
from jax.extend.mlir.passmanager import PassManager
from jaxlib.triton import dialect

from benchmarks.kernels.compile_h100 import Model, for_gpu, kernels, lower_for_h100
from chameleon_jax.models.ops import pallas_triton as pt
from chameleon_jax.models.runtime import steps
from chameleon_jax.models.runtime.buckets import Program

PROGRAMS = (
    Program(1, 1, 0, 7),
    Program(4, 4, 0, 4),
    Program(128, 128, 0, 7),
    Program(64, 0, 2, 7),
    Program(192, 0, 6, 7),
    Program(2048, 0, 64, 7),
    Program(768, 128, 24, 7),
)

AXES = {
    "decode_attention": 3,
    "prefill_attention": 3,
    "merge_attention": 3,
    "lora_shrink": 2,
    "lora_expand": 2,
    "write_pages": 2,
}
"""Axes of each kernel's grid."""
MOST_PROGRAMS = 1 << 24
"""Bound on the programs of a launch along one axis."""


def parsed(code: dict[str, Any], context: ir.Context) -> ir.Module:
    dialect.register_dialect(context)
    context.load_all_available_dialects()
    module = ir.Module.parse(code["ir"])
    PassManager.parse("builtin.module(canonicalize,cse)").run(module.operation)
    return module


def program_numbers(code: dict[str, Any]) -> dict[str, set[int]]:
    """List the axes whose program number a launch's code reads, each with the extents that it takes the number modulo."""
    found: dict[str, set[int]] = {}

    def visit(operation: Any) -> Any:
        if operation.name == "tt.get_program_id":
            users = [use.owner for use in operation.results[0].uses]
            extents = {user.operands[1].owner.attributes["value"].value for user in users if "arith.rem" in user.name}
            found.setdefault(str(operation.attributes["axis"]), set()).update(extents)
        return ir.WalkResult.ADVANCE

    with ir.Context() as context, ir.Location.unknown():
        parsed(code, context).operation.walk(visit)
    return found


def simplified(code: dict[str, Any]) -> dict[str, Any]:
    """Read the attributes of a launch with Triton's code as text: constants in order, then the rest.

    The raw code multiplies every first extent by the constant zero, where an array's only block begins.
    """
    with ir.Context() as context, ir.Location.unknown():
        lines = str(parsed(code, context)).splitlines()
    constants = sorted(line for line in lines if "arith.constant" in line)
    return code | {"ir": constants + [line for line in lines if "arith.constant" not in line]}


@pytest.mark.parametrize("preset", ["llama-7b", "llama-3-8b"])
def test_code_does_not_depend_on_first_extents(preset, monkeypatch):
    monkeypatch.setattr(pt, "_codes", {})
    seen = pt._seen
    monkeypatch.setattr(pt, "_seen", lambda array: (tuple(array.shape), array.dtype.name))  # as it would be without the rule
    model = Model.of(preset, 1)
    for program in PROGRAMS:
        model.lower_step(program)
    piece = jax.ShapeDtypeStruct((1, 2, model.layout.page_elems), jnp.bfloat16)
    write = functools.partial(steps.write_adapter, backend="triton")
    lower_for_h100(write, model.pages, piece, jax.ShapeDtypeStruct((2,), jnp.int32), donate_argnums=0)
    codes = dict(pt._codes)
    shared = {}
    for kernel, code in codes.items():
        hidden = [tuple(seen(jax.ShapeDtypeStruct(*shape)) for shape in side) for side in (kernel.inputs, kernel.outputs)]
        alike = dataclasses.replace(kernel, inputs=hidden[0], outputs=hidden[1])
        if alike not in shared:
            with for_gpu():
                shared[alike] = pt._translate(alike)
        assert code is not None and simplified(shared[alike]) == simplified(code), kernel.name
        numbers = program_numbers(code)
        assert len(numbers) == AXES[kernel.name], kernel.name
        assert all(extent > MOST_PROGRAMS for extents in numbers.values() for extent in extents), kernel.name
    assert {kernel.name for kernel in codes} >= AXES.keys() - {"merge_attention"}
    assert len(shared) < 0.7 * len(codes)


def test_pallas_launches_kernels_where_launches_have_another_name(monkeypatch):
    monkeypatch.setattr(pt, "_codes", {})
    monkeypatch.setattr(pt, "TARGET", "another name")
    compiled = Model.of("llama-7b", 1).compile_step(Program(4, 4, 0, 7))
    assert set(pt._codes.values()) == {None}
    assert kernels(compiled)["lora_shrink"] == kernels(compiled)["lora_expand"] == 4
