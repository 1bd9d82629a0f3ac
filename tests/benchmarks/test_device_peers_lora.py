"""Batched adapters in torch, which the section `peers` times: equal to our own float32 model, and a wrong one is noticed."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import types

import pytest

from benchmarks.device.sections import peers
from chameleon_jax.models.config import PRESETS

MODELS = {"grouped heads": PRESETS["tiny"], "heads alike": dataclasses.replace(PRESETS["tiny"], num_kv_heads=4)}


@pytest.fixture
def lora():
    """Collect the modules that need torch, and a function for the error of a way to add adapters."""
    torch = pytest.importorskip("torch")
    from benchmarks.device.sections.peers import torch_check, torch_lora, torch_mixes

    def error(name, config=PRESETS["tiny"], build=None):
        build = build or torch_mixes.variants()[name]
        return torch_check.mixed_error(config, torch.float32, torch.device("cpu"), build, name == torch_mixes.IN_ORDER)

    return types.SimpleNamespace(
        torch=torch,
        check=torch_check,
        stack=torch_lora.AdapterStack,
        bmm=torch_lora.BmmAdapters,
        mixes=torch_mixes,
        error=error,
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["IN_ORDER", "BY_INDEX"])
def test_mixed_ranks_and_rows_without_an_adapter_match_the_reference(lora, model, name):
    assert all(rank % 16 for rank in lora.check.RANKS) and None in lora.check.MIXED_ROWS
    assert lora.error(getattr(lora.mixes, name), MODELS[model]) < peers.LIMIT


def test_a_prompt_with_one_adapter_matches_the_reference(lora):
    cpu = lora.torch.device("cpu")
    model = PRESETS["tiny"], lora.torch.float32, cpu, "torch's choice", lora.check.PLAIN
    build = lora.mixes.variants()[lora.mixes.IN_ORDER]
    assert all(lora.check.largest_error(*model, build, (adapter,)) < peers.LIMIT for adapter in (0, 2))


def test_the_check_notices_a_wrong_adapter_of_one_row(lora):
    def swapped(stack, owners):
        return lora.bmm(stack, [0 if owner == 1 else owner for owner in owners], in_order=False)

    def missing(stack, owners):
        return lora.bmm(stack, [None, *owners[1:]], in_order=False)

    assert min(lora.error(lora.mixes.BY_INDEX, build=wrong) for wrong in (swapped, missing)) > 100 * peers.LIMIT


def test_products_in_row_order_refuse_rows_in_another_order(lora):
    stack = lora.stack(PRESETS["tiny"], (8, 40, 16), ("o_proj",), lora.torch.float32, lora.torch.device("cpu"))
    for owners in ([0, 1, 2], [1, 2, 0], [1, 0, 0], [1, None, 0, None, 2]):
        with pytest.raises(ValueError, match="not ordered"):
            lora.bmm(stack, owners, in_order=True)
    lora.bmm(stack, [1, 0, 2, None], in_order=True)


def test_targets_that_share_an_input_come_together(lora):
    with pytest.raises(ValueError, match="q_proj, k_proj, v_proj come together"):
        lora.stack(PRESETS["tiny"], (8,), ("q_proj", "v_proj"), lora.torch.float32, lora.torch.device("cpu"))


INTERPRETED = """
import dataclasses
import torch
import triton.runtime.interpreter as interpreter
from benchmarks.device.sections.peers import torch_check, torch_lora, triton_lora
from chameleon_jax.models.config import PRESETS

patch = interpreter._patch_lang_tensor

def patch_for_numpy(tensor, scope):  # triton 3.6 calls int() on an array of one element, which NumPy 2.4 refuses
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

interpreter._patch_lang_tensor = patch_for_numpy
triton_lora.SPLIT_ELEMS = 320  # so that d_in of `down` is read in two parts, the last of them not whole
config = dataclasses.replace(PRESETS["tiny"], num_layers=1, intermediate_size=640)
stack = torch_check._stack(config, torch.float32, torch.device("cpu"))
ours = triton_lora.TritonAdapters(stack, torch_check.MIXED_ROWS)
theirs = torch_lora.BmmAdapters(stack, torch_check.MIXED_ROWS, in_order=False)
for name, group in stack.groups.items():
    d_in = group.a[0].shape[-1]
    x, weight = torch.randn(len(torch_check.MIXED_ROWS), 1, d_in), torch.randn(group.width, d_in) * d_in**-0.5
    right = theirs.product(0, name, x, weight)
    update = (right - x @ weight.T).abs().max() / right.abs().max()
    error = (ours.product(0, name, x, weight) - right).abs().max() / right.abs().max()
    print(name, float(update), float(error))
"""


def test_triton_kernels_match_copies_by_index_in_their_interpreter():
    """Copies by index match the reference, by the tests above."""
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    assert len(found) == 4 and all(float(update) > 0.1 and float(error) < peers.LIMIT for _, update, error in found), found


def test_triton_kernels_compile_for_an_h100_with_16_byte_copies():
    """Needs no GPU: the compiler comes with Triton."""
    pytest.importorskip("torch")
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from benchmarks.device.sections.peers import triton_lora

    divisible = [["tt.divisibility", 16]]
    pointers = {"x": "*bf16", "a": "*bf16", "y": "*bf16", "b": "*bf16", "low": "*fp32", "tasks": "*i32", "entries": "*i32"}
    constants = {"unit": 16, "block_k": triton_lora.BLOCK_K, "block_n": triton_lora.BLOCK_N, "splits": 4, "targets": 3}
    for kernel in (triton_lora._shrink, triton_lora._expand):
        names = kernel.arg_names
        any_number = {"num_tasks", "steps", *constants}
        source = triton.compiler.ASTSource(
            kernel,
            {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names},
            {(i,): constants[name] for i, name in enumerate(names) if name in constants},
            {(i,): divisible for i, name in enumerate(names) if name not in any_number},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True})
        assert "cp.async.cg.shared.global" in compiled.asm["ptx"]  # the only width that it has is 16 bytes
