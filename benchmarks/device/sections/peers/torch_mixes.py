"""Steps of the torch model with a batch of adapters, timed with each way to add them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.device.scale import Mix, Scale
from benchmarks.device.sections.peers.torch_lora import AdapterStack, BmmAdapters, Owners, in_stack_order, stack_elems
from benchmarks.device.sections.peers.torch_steps import Measured, Step, TorchBench, device, first_line
from benchmarks.device.timing import time_calls

Build = Callable[[AdapterStack, Owners], Any]
"""Maker of a batch's updates, a `torch_llama.Adapters`."""
IN_ORDER = "bmm, adapters in row order (no look-up)"
BY_INDEX = "bmm, adapters copied by index"
TRITON = "Triton, read through an index"
TRITON_BESIDE = "Triton, shrink beside the base product"


def variants(kernels: bool = True) -> dict[str, Build]:
    """Ways to add adapters on this machine; without `kernels`, torch's alone."""
    found: dict[str, Build] = {
        IN_ORDER: functools.partial(BmmAdapters, in_order=True),
        BY_INDEX: functools.partial(BmmAdapters, in_order=False),
    }
    if kernels and torch.cuda.is_available() and importlib.util.find_spec("triton"):
        found[TRITON] = functools.partial(_triton, beside=False)
        found[TRITON_BESIDE] = functools.partial(_triton, beside=True)
    return found


def worth_timing(right: list[str]) -> list[str]:
    """Correct variants to time; copies are among them only if no kernel reads through an index."""
    return [name for name in right if name != BY_INDEX or TRITON not in right]


def _triton(stack: AdapterStack, owners: Owners, beside: bool) -> Any:
    from benchmarks.device.sections.peers.triton_lora import TritonAdapters

    return TritonAdapters(stack, owners, beside=beside)


class TorchMixes:
    """Measurements of batches of adapters on the model of a `TorchBench`."""

    def __init__(self, scale: Scale, bench: TorchBench):
        self._scale, self._bench = scale, bench
        self._dtype = getattr(torch, scale.dtype)

    def decode(self, rows: int, context: int, mix: Mix, count: int, names: list[str]) -> list[Measured]:
        """Measure one token for each of `rows` sequences of `context` tokens; row i has adapter i modulo `count`."""
        return self._measure((rows, 1), context - 1, mix, count, {name: variants()[name] for name in names})

    def prefill(self, tokens: int, mix: Mix, names: list[str]) -> list[Measured]:
        """Measure one prompt with one adapter, whose products are plain and need no look-up."""
        if IN_ORDER not in names:
            return [Measured("torch, LoRA", None, note="plain products did not pass their check")]
        return self._measure((1, tokens), 0, mix, 1, {"plain products": variants()[IN_ORDER]})

    def _measure(self, shape: tuple[int, int], start: int, mix: Mix, count: int, builds: dict[str, Build]) -> list[Measured]:
        ranks = list(itertools.islice(itertools.cycle(mix.ranks), count))
        adapter_bytes = stack_elems(self._scale.config, ranks, mix.targets) * self._dtype.itemsize
        lacking = self._bench.lacking(shape[0] * (start + shape[1]), adapter_bytes)
        if lacking:
            return [Measured("torch, LoRA", None, note=lacking)]
        try:
            stack = AdapterStack(self._scale.config, ranks, mix.targets, self._dtype, device()).randomize()
            cache = self._bench.cache(shape[0], start + shape[1])
            tokens = torch.randint(self._scale.config.vocab_size, shape, device=device())
            attention, pieces = self._bench.best(tokens, start, cache)
        except torch.OutOfMemoryError as error:
            return [Measured("torch, LoRA", None, note=first_line(error))]
        owners = in_stack_order(stack, [row % count for row in range(shape[0])])
        found = []
        for name, build in builds.items():
            variant = ", ".join(["torch", *[pieces.name] * bool(pieces.name), f"LoRA by {name}"])
            try:
                step = Step(self._bench.model, tokens.clone(), start, cache, attention, pieces, build(stack, owners))
                found.append(Measured(variant, time_calls(step.run), attention))
                del step  # its graph holds memory
            except (ValueError, torch.OutOfMemoryError) as error:
                found.append(Measured(variant, None, note=first_line(error)))
        return _fastest_marked(found)


def _fastest_marked(found: list[Measured]) -> list[Measured]:
    timed = [m for m in found if m.timing is not None]
    if len(timed) < 2:
        return found
    fastest = min(timed, key=lambda m: m.timing.seconds)  # type: ignore[union-attr]
    return [dataclasses.replace(m, note=f"fastest of {len(timed)}") if m is fastest else m for m in found]
