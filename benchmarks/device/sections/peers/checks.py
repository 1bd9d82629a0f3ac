"""Checks of the torch steps against this project's own model, as rows of the report."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from benchmarks.device.report import Row
from chameleon_jax.models.config import PRESETS, LlamaConfig

if TYPE_CHECKING:  # it may be missing
    import torch

LIMIT = 1e-4
BFLOAT16_LIMIT = 5e-2


def check() -> list[Row]:
    """Check the torch model against this project's, on a GPU also with the kernels that are timed."""
    import torch

    from benchmarks.device.sections.peers.torch_check import largest_error
    from benchmarks.device.sections.peers.torch_llama import PLAIN, compiled_pieces
    from benchmarks.device.sections.peers.torch_steps import GPU_ATTENTION, TORCHS_CHOICE, device

    def row(dtype: torch.dtype, attention: str, compiled: bool = False) -> Row:
        config, limit = _model(dtype)
        facts: Row = {
            "torch model": _title(dtype),
            "attention": attention,
            "element-wise": "compiled" if compiled else "plain",
        }
        try:
            error = largest_error(config, dtype, device(), attention, compiled_pieces() if compiled else PLAIN)
        except Exception as failure:
            if attention == TORCHS_CHOICE and not compiled:
                raise
            return {**facts, "skipped": str(failure).strip()[:200]}  # a missing kernel is not timed either
        return facts | _judged(error, limit)

    rows = [row(torch.float32, TORCHS_CHOICE)]
    if torch.cuda.is_available():
        rows += [row(torch.bfloat16, attention) for attention in GPU_ATTENTION]
        rows.append(row(torch.bfloat16, TORCHS_CHOICE, compiled=True))
    return rows


def check_lora(kernels: bool = True) -> list[Row]:
    """Check each way to add adapters: mixed ranks, rows without an adapter, a prompt and then single tokens.

    Args:
        kernels: Whether the Triton kernels are checked too.
    """
    import torch

    from benchmarks.device.sections.peers import torch_mixes
    from benchmarks.device.sections.peers.torch_check import mixed_error
    from benchmarks.device.sections.peers.torch_steps import device

    rows = []
    for name, build in torch_mixes.variants(kernels).items():
        for dtype in (torch.float32, torch.bfloat16) if torch.cuda.is_available() else (torch.float32,):
            config, limit = _model(dtype)
            facts: Row = {"torch model": _title(dtype), "LoRA": name}
            try:
                error = mixed_error(config, dtype, device(), build, name == torch_mixes.IN_ORDER)
            except Exception as failure:
                if not name.startswith("Triton"):
                    raise
                rows.append({**facts, "skipped": str(failure).strip()[:200]})
                continue
            rows.append(facts | _judged(error, limit))
    return rows


def torch_works() -> bool:
    """Return whether the device still computes."""
    import torch

    from benchmarks.device.sections.peers.torch_steps import device

    try:
        return torch.ones(8, device=device()).sum().item() == 8.0
    except Exception:
        return False


def _model(dtype: torch.dtype) -> tuple[LlamaConfig, float]:
    """Model to check in a dtype, and the limit; attention on a GPU needs heads of a usual size."""
    tiny = PRESETS["tiny"]
    if str(dtype) == "torch.float32":
        return tiny, LIMIT
    return dataclasses.replace(tiny, num_kv_heads=4, head_dim=128), BFLOAT16_LIMIT


def _title(dtype: torch.dtype) -> str:
    from benchmarks.device.sections.peers.torch_steps import device

    return f"{str(dtype).removeprefix('torch.')} on {device().type} against float32 JAX on cpu"


def _judged(error: float, limit: float) -> Row:
    return {"error": f"{error:.1e}", "limit": limit, "ok": error < limit}  # NaN is not less than anything
