"""Section `peers`: what the same device does with torch, and with transformers + peft.

The torch step (torch_llama.py) is the strongest that we could write for weights without adapters; its rows stand beside those
of the sections `decode` and `prefill`: same rows, same contexts, same floor. JAX must not take the device in this process.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

from benchmarks.device.prefill import operations
from benchmarks.device.report import Case, Report, Row
from benchmarks.device.scale import FULL, Mix, Scale
from benchmarks.device.timing import Timing
from benchmarks.device.workbench import Workbench
from chameleon_jax.models.config import ATTENTION_TARGETS, PRESETS

if TYPE_CHECKING:  # they import what may be missing
    from benchmarks.device.peers.mixed_adapters import MixedAdapters
    from benchmarks.device.peers.torch_steps import TorchBench

MIX = Mix("rank 16, q k v o", (16,), ATTENTION_TARGETS)
MOST_MIXED_ROWS = 32
"""Every row has an adapter of its own, and each takes peft some kernels a matrix."""
LIMIT = 1e-4
BFLOAT16_LIMIT = 5e-2


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    if missing("torch"):
        return [Case("torch", lambda: [{"peer": "torch", "skipped": missing("torch")}])]
    import torch

    if scale == FULL and not torch.cuda.is_available():
        return [Case("torch", lambda: [{"peer": "torch", "skipped": "this torch finds no GPU"}])]
    peers = Peers(scale, report)
    found = [Case("packages", versions), Case("correctness", check)]
    for context in scale.contexts:
        for rows in scale.rows:
            found.append(Case(f"{rows} rows, {context} tokens", functools.partial(peers.decode, rows, context)))
    found.append(Case(f"1 prompt of {scale.prompt_tokens}", peers.prefill))
    absent = missing("transformers") or missing("peft")
    if absent:
        return [*found, Case("transformers + peft", lambda: [{"peer": "transformers + peft", "skipped": absent}])]
    for adapted in (False, True):  # the model without adapters is measured before they are put into it
        for rows in peers.mixed_rows:
            name = f"transformers{' + peft' * adapted}, {rows} rows"
            found.append(Case(name, functools.partial(peers.mixed, rows, adapted)))
    return found


def missing(package: str) -> str:
    """What is said of a package that is not there; empty: it is."""
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"


def versions() -> list[Row]:
    packages = [name for name in ("torch", "triton", "transformers", "peft") if not missing(name)]
    return [{"package": name, "version": importlib.metadata.version(name)} for name in packages]


def check() -> list[Row]:
    """The torch model against this project's; on a GPU also with the kernels that are timed."""
    import torch

    from benchmarks.device.peers.torch_check import largest_error
    from benchmarks.device.peers.torch_llama import PLAIN, compiled_pieces
    from benchmarks.device.peers.torch_steps import GPU_ATTENTION, TORCHS_CHOICE, device

    def row(dtype: torch.dtype, attention: str, compiled: bool = False) -> Row:
        small = dtype == torch.float32
        config = PRESETS["tiny"] if small else dataclasses.replace(PRESETS["tiny"], num_kv_heads=4, head_dim=128)
        limit = LIMIT if small else BFLOAT16_LIMIT
        facts: Row = {
            "torch model": f"{str(dtype).removeprefix('torch.')} on {device().type} against float32 JAX on cpu",
            "attention": attention,
            "element-wise": "compiled" if compiled else "plain",
        }
        try:
            error = largest_error(config, dtype, device(), attention, compiled_pieces() if compiled else PLAIN)
        except Exception as failure:
            if attention == TORCHS_CHOICE and not compiled:
                raise
            return {**facts, "skipped": str(failure).strip()[:200]}  # what is not to be had is not timed either
        return {**facts, "error": f"{error:.1e}", "limit": limit, "ok": error < limit}  # NaN is not less than anything

    rows = [row(torch.float32, TORCHS_CHOICE)]
    if torch.cuda.is_available():
        rows += [row(torch.bfloat16, attention) for attention in GPU_ATTENTION]
        rows.append(row(torch.bfloat16, TORCHS_CHOICE, compiled=True))
    return rows


class Peers:
    """Measures what it builds when it is first asked."""

    def __init__(self, scale: Scale, report: Report):
        self._scale, self._report = scale, report
        self._ours = Workbench(scale)  # for its sizes: no engine is built
        self.mixed_rows = [rows for rows in scale.rows if 1 < rows <= MOST_MIXED_ROWS]

    def decode(self, rows: int, context: int) -> list[Row]:
        floor = self._floor(rows, context)
        ours = self._of_ours("decode", rows=rows, context=context, adapters="base")
        return [
            {"peer": m.variant, "rows": rows, "context": context, "adapters": "base"}
            | (_timed(m.timing, floor, ours, m.attention, m.note) if m.timing else {"skipped": m.note})
            for m in self._torch.decode(rows, context)
        ]

    def prefill(self) -> list[Row]:
        tokens = self._scale.prompt_tokens
        name = f"1 prompt of {tokens}"
        ours = self._of_ours("prefill", prompts=name, adapters="base")
        found = []
        for m in self._torch.prefill(tokens):
            row: Row = {"peer": m.variant, "prompts": name, "adapters": "base"}
            if m.timing is None:
                found.append({**row, "skipped": m.note})
                continue
            rate = operations(self._ours, 1, tokens, 0) / m.timing.seconds
            row |= {
                "ms": round(m.timing.ms, 3),
                "spread %": round(100 * m.timing.spread, 1),
                "TFLOP/s": round(rate / 1e12, 2),
                "% of the matrix rate": round(100 * rate / self._ceilings["matrix"], 1),
            }
            found.append(row | _beside(m.timing, ours) | {"attention": m.attention})
        return found

    def mixed(self, rows: int, adapted: bool) -> list[Row]:
        """A batch of which every row has an adapter of its own, or none has one."""
        from benchmarks.device.peers.torch_steps import free_memory

        self.__dict__.pop("_torch", None)  # its weights are not needed any more
        free_memory()
        context, mix = min(self._scale.contexts), MIX if adapted else Mix("base")
        timing = self._mixed.measure(rows, context, adapted)
        free_memory()
        floor = self._floor(rows, context, rows if adapted else 0)
        ours = self._of_ours("decode", rows=rows, context=context, adapters=mix.name)
        peer = "transformers" + " + peft" * adapted
        note = f"{rows} adapters; " * adapted + "forward steps, KV cache grows"
        row: Row = {"peer": peer, "rows": rows, "context": context, "adapters": mix.name}
        return [row | _timed(timing, floor, ours, "sdpa", note)]

    @functools.cached_property
    def _torch(self) -> TorchBench:
        from benchmarks.device.peers.torch_steps import TorchBench

        return TorchBench(self._scale, self._ours.token_bytes)

    @functools.cached_property
    def _mixed(self) -> MixedAdapters:
        from benchmarks.device.peers.mixed_adapters import MixedAdapters

        return MixedAdapters(self._scale, MIX, max(self.mixed_rows))

    @property
    def _ceilings(self) -> dict[str, float]:
        """What the section `machine` measured; where it was not run, what torch does: JAX must not take this device."""
        from benchmarks.device.peers.torch_steps import ceilings

        measured = self._report.ceilings or {}
        return measured if {"copy", "matrix"} <= set(measured) else ceilings(self._scale)

    def _floor(self, rows: int, context: int, adapters: int = 0) -> float:
        """Seconds to read the weights, the rows' KV and as many adapters of MIX, as the section `decode` counts them."""
        ours = self._ours
        elems = sum(r * sum(ours.config.target_shape(t)) for r in MIX.ranks for t in MIX.targets) * ours.config.num_layers
        num_bytes = ours.weight_bytes + rows * context * ours.token_bytes + adapters * elems * ours.dtype.itemsize
        return num_bytes / self._ceilings["copy"]

    def _of_ours(self, section: str, **columns: Any) -> Row | None:
        """This project's row with these values."""
        if section not in self._report.content["sections"]:
            return None
        rows = (row for row in self._report.rows(section) if "ms" in row)
        return next((row for row in rows if all(row.get(name) == value for name, value in columns.items())), None)


def _timed(timing: Timing, floor: float, ours: Row | None, attention: str, note: str) -> Row:
    return {
        "ms": round(timing.ms, 3),
        "spread %": round(100 * timing.spread, 1),
        "host ms": round(timing.host_ms, 3),
        "floor ms": round(floor * 1e3, 3),
        "% of floor": round(100 * floor / timing.seconds, 1),
        **_beside(timing, ours),
        "attention": attention,
        "note": note,
    }


def _beside(timing: Timing, ours: Row | None) -> Row:
    """More than 1: the peer takes longer."""
    return {
        "chameleon-jax ms": ours["ms"] if ours else "not measured",
        "ratio to chameleon-jax": round(timing.ms / ours["ms"], 3) if ours else "",
        "ratio to its device ms": round(timing.ms / ours["device ms"], 3) if ours else "",
    }
