"""Section `peers`: the same steps in torch, with and without adapters, and in transformers + peft.

The torch step (torch_llama.py, torch_lora.py) is the strongest that we could write. Its rows stand beside the rows of the
sections `decode` and `prefill`, with the same rows, contexts, mixes of adapters and floor. Cases come in order of importance.
JAX must not take the device in this process.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import itertools
import re
import sys
from typing import TYPE_CHECKING, Any

from benchmarks.device.report import Case, Report, Row
from benchmarks.device.scale import FULL, Mix, Scale
from benchmarks.device.sections.peers.checks import LIMIT, check, check_lora, torch_works
from benchmarks.device.sections.prefill import operations
from benchmarks.device.timing import Timing
from benchmarks.device.workbench import Workbench
from chameleon_jax.models.config import ATTENTION_TARGETS

if TYPE_CHECKING:  # they import packages that may be missing
    from benchmarks.device.sections.peers.mixed_adapters import MixedAdapters
    from benchmarks.device.sections.peers.torch_mixes import TorchMixes
    from benchmarks.device.sections.peers.torch_steps import Measured, TorchBench

__all__ = ["LIMIT", "MIX", "Peers", "cases"]
MIX = Mix("rank 16, q k v o", (16,), ATTENTION_TARGETS)
MOST_MIXED_ROWS = 32
"""Rows with an adapter each, at most; each adapter takes peft some kernels a matrix."""
BASE = Mix("base")
LORA_CHECK = "correctness, LoRA"
FIRST_ROWS = (32, 128)
"""Batches that are measured before the others."""
LEFT_OUT = (1, 64)
"""Batches that are not measured with adapters, to save time."""


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    if missing("torch"):
        return [Case("torch", lambda: [{"peer": "torch", "skipped": missing("torch")}])]
    import torch

    if scale == FULL and not torch.cuda.is_available():
        return [Case("torch", lambda: [{"peer": "torch", "skipped": "this torch finds no GPU"}])]
    peers = Peers(scale, report)
    found = [Case("packages", versions), Case("correctness", check), Case(LORA_CHECK, peers.check_lora)]
    found += torch_cases(peers, scale)
    absent = missing("transformers") or missing("peft")
    if absent:
        return [*found, Case("transformers + peft", lambda: [{"peer": "transformers + peft", "skipped": absent}])]
    for adapted in (False, True):  # the model without adapters is measured before they are put into it
        for rows in peers.mixed_rows:
            name = f"transformers{' + peft' * adapted}, {rows} rows"
            found.append(Case(name, functools.partial(peers.mixed, rows, adapted)))
    return found


def torch_cases(peers: Peers, scale: Scale) -> list[Case]:
    """List the steps of the torch model in order of importance."""
    found: list[Case] = []

    def decode(rows: int, context: int, mixes: tuple[Mix, ...]) -> None:
        for mix in mixes:
            name = f"{rows} rows, {context} tokens" + f", {mix.name}" * bool(mix.ranks)
            found.append(Case(name, functools.partial(peers.decode, rows, context, mix)))

    first = [rows for rows in scale.rows if rows in FIRST_ROWS]
    others = [rows for rows in scale.rows if rows not in FIRST_ROWS]
    mixes = tuple(mix for mix in scale.mixes if mix.ranks)
    least, *longer = sorted(scale.contexts)
    for rows in first:
        decode(rows, least, (BASE, *mixes))
    for mix in (BASE, MIX):
        name = f"1 prompt of {scale.prompt_tokens}" + f", {mix.name}" * bool(mix.ranks)
        found.append(Case(name, functools.partial(peers.prefill, mix)))
    for rows in others:
        decode(rows, least, (BASE,))
    for context in longer:
        for rows in (*first, *others):
            decode(rows, context, (BASE,))
    for rows in others:
        decode(rows, least, mixes if rows not in LEFT_OUT else ())
    for context in longer:
        for rows in first:
            decode(rows, context, mixes)
    return found


def missing(package: str) -> str:
    """Reason why a package cannot be used, empty if it is installed."""
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"


def versions() -> list[Row]:
    packages = [name for name in ("torch", "triton", "transformers", "peft") if not missing(name)]
    return [{"package": name, "version": importlib.metadata.version(name)} for name in packages]


def adapters_of(ours: Row | None, rows: int) -> int:
    """Adapters of this project's batch: one a row, or fewer if its note says that its pool held no more."""
    noted = re.match(r"(\d+) adapters", ours.get("note", "")) if ours else None
    return int(noted[1]) if noted else rows


class Peers:
    """Peers, each built when it is first measured."""

    def __init__(self, scale: Scale, report: Report):
        self._scale, self._report = scale, report
        self._ours = Workbench(scale)  # its sizes alone; no engine is built
        self.mixed_rows = [rows for rows in scale.rows if 1 < rows <= MOST_MIXED_ROWS]

    def check_lora(self) -> list[Row]:
        """Check each way to add adapters on the tiny model; a wrong way is not timed."""
        rows = self._lora_rows
        if not torch_works():  # the supervisor goes on with the next case in another process
            sys.exit(f"torch computes nothing any more after {rows}")
        return rows

    def decode(self, rows: int, context: int, mix: Mix = BASE) -> list[Row]:
        ours = self._of_ours("decode", rows=rows, context=context, adapters=mix.name)
        adapters = adapters_of(ours, rows) if mix.ranks else 0
        floor = self._floor(rows, context, adapters, mix)
        note = f"{adapters} adapters" if 0 < adapters < rows else ""
        if mix.ranks and not self._right_lora:
            return [_none_right(mix)]
        if mix.ranks:
            measured = self._mixes.decode(rows, context, mix, adapters, self._right_lora)
        else:
            measured = self._torch.decode(rows, context)
        found = []
        for m in measured:
            notes = "; ".join(filter(None, (note, m.note)))
            facts = _timed(m.timing, floor, ours, m.attention, notes) if m.timing else {"skipped": notes}
            found.append({"peer": m.variant, "rows": rows, "context": context, "adapters": mix.name} | facts)
        return found

    def prefill(self, mix: Mix = BASE) -> list[Row]:
        if mix.ranks and not self._right_lora:
            return [_none_right(mix)]
        tokens = self._scale.prompt_tokens
        name = f"1 prompt of {tokens}"
        ours = self._of_ours("prefill", prompts=name, adapters=mix.name)
        measured = self._mixes.prefill(tokens, mix, self._right_lora) if mix.ranks else self._torch.prefill(tokens)
        return [self._prefill_row({"peer": m.variant, "prompts": name, "adapters": mix.name}, m, ours) for m in measured]

    def _prefill_row(self, row: Row, m: Measured, ours: Row | None) -> Row:
        if m.timing is None:
            return {**row, "skipped": m.note}
        rate = operations(self._ours, 1, self._scale.prompt_tokens, 0) / m.timing.seconds
        row |= {
            "ms": round(m.timing.ms, 3),
            "spread %": round(100 * m.timing.spread, 1),
            "TFLOP/s": round(rate / 1e12, 2),
            "% of the matrix rate": round(100 * rate / self._ceilings["matrix"], 1),
        }
        return row | _beside(m.timing, ours) | {"attention": m.attention}

    def mixed(self, rows: int, adapted: bool) -> list[Row]:
        """Measure a batch in which every row has an adapter of its own, or none has one."""
        from benchmarks.device.sections.peers.torch_steps import free_memory

        for unneeded in ("_torch", "_mixes"):  # their weights
            self.__dict__.pop(unneeded, None)
        free_memory()
        context, mix = min(self._scale.contexts), MIX if adapted else BASE
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
        from benchmarks.device.sections.peers.torch_steps import TorchBench

        return TorchBench(self._scale, self._ours.token_bytes)

    @functools.cached_property
    def _mixes(self) -> TorchMixes:
        from benchmarks.device.sections.peers.torch_mixes import TorchMixes

        return TorchMixes(self._scale, self._torch)

    @functools.cached_property
    def _lora_rows(self) -> list[Row]:
        """Rows of the check, by this process or one before it, without our own kernels if the check ended that process."""
        if not self._report.has("peers", LORA_CHECK):
            return check_lora()
        rows = [row for row in self._report.rows("peers") if "LoRA" in row]
        return rows or check_lora(kernels=False)

    @property
    def _right_lora(self) -> list[str]:
        from benchmarks.device.sections.peers.torch_mixes import worth_timing

        wrong = {row["LoRA"] for row in self._lora_rows if not row.get("ok")}
        return worth_timing([name for name in dict.fromkeys(row["LoRA"] for row in self._lora_rows) if name not in wrong])

    @functools.cached_property
    def _mixed(self) -> MixedAdapters:
        from benchmarks.device.sections.peers.mixed_adapters import MixedAdapters

        return MixedAdapters(self._scale, MIX, max(self.mixed_rows))

    @property
    def _ceilings(self) -> dict[str, float]:
        """Ceilings of the section `machine`, or of torch if that was not run: JAX must not take this device."""
        from benchmarks.device.sections.peers.torch_steps import ceilings

        measured = self._report.ceilings or {}
        return measured if {"copy", "matrix"} <= set(measured) else ceilings(self._scale)

    def _floor(self, rows: int, context: int, adapters: int = 0, mix: Mix = MIX) -> float:
        """Seconds to read the weights, the rows' KV and `adapters` adapters of a mix, as the section `decode` counts them."""
        ours = self._ours
        ranks = itertools.islice(itertools.cycle(mix.ranks), adapters)
        elems = sum(ranks) * sum(sum(ours.config.target_shape(t)) for t in mix.targets) * ours.config.num_layers
        num_bytes = ours.weight_bytes + rows * context * ours.token_bytes + elems * ours.dtype.itemsize
        return num_bytes / self._ceilings["copy"]

    def _of_ours(self, section: str, **columns: Any) -> Row | None:
        """Find this project's row with these values, from this call alone."""
        return self._report.find(section, **columns) if section in self._report.content["sections"] else None


def _none_right(mix: Mix) -> Row:
    return {"peer": "torch, LoRA", "adapters": mix.name, "skipped": "no way to add adapters passed its check"}


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
    """Columns beside this project's; a ratio above 1 says that the peer takes longer."""
    return {
        "chameleon-jax ms": ours["ms"] if ours else "not measured",
        "ratio to chameleon-jax": round(timing.ms / ours["ms"], 3) if ours else "",
        "ratio to its device ms": round(timing.ms / ours["device ms"], 3) if ours else "",
    }
