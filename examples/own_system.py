"""Serve with a `System` of your own: choose who starts next, which adapters stay and how they load.

Run: python examples/own_system.py

Prints the mean time to first token of short and of long requests, under a built-in system and under one that starts the
shortest predicted output first. The model is tiny and has random weights: the gap between short and long requests means
something, the milliseconds do not. `python -m benchmarks simulate` compares systems on a modelled device.
"""

import dataclasses
import statistics
import tempfile
from typing import Any

from chameleon_jax import LLM, LoRARequest, SamplingParams
from chameleon_jax.checkpoints.finetune import FinetuneConfig, init_adapter, save
from chameleon_jax.models.config import PRESETS
from chameleon_jax.systems import SYSTEMS

SHORTEST_FIRST = dataclasses.replace(SYSTEMS["fifo"], order="sjf", eviction="gdsf")
SHORT, LONG = 4, 32
"""Output tokens of a request; every adapter keeps to one of the two, so its history predicts them."""
REQUESTS = 48


def mean_ttft(llm: LLM, adapters: list[LoRARequest]) -> dict[int, float]:
    """Run REQUESTS requests twice and return the second round's mean time to first token by output length, in seconds."""
    params = [SamplingParams(temperature=0, max_tokens=(SHORT, LONG)[i % 2], ignore_eos=True) for i in range(REQUESTS)]
    for _ in range(2):  # the first round fills the histories
        waits: dict[int, list[float]] = {SHORT: [], LONG: []}
        for output in llm.generate([list(range(3, 19))] * REQUESTS, params, adapters * (REQUESTS // 4)):
            times = output.metrics
            waits[len(output.outputs[0].token_ids)].append((times.first_token_time or 0) - times.arrival_time)
    return {length: statistics.mean(seconds) for length, seconds in waits.items()}


def main() -> None:
    """Write four adapters, then compare two systems over the same compiled programs."""
    settings: dict[str, Any] = dict(max_num_seqs=4, max_model_len=64, max_num_batched_tokens=32, max_lora_rank=8, num_pages=120)
    with tempfile.TemporaryDirectory() as folder, LLM("tiny", load_format="dummy", **settings) as llm:
        adapters = [LoRARequest(f"tenant-{i}", f"{folder}/{i}") for i in range(4)]
        for i, adapter in enumerate(adapters):
            config = FinetuneConfig(rank=8, seed=i)
            save(init_adapter(PRESETS["tiny"], config), str(adapter.path), config, "tiny", "float32")
        for name, system in (("fifo", "fifo"), ("shortest first", SHORTEST_FIRST)):
            llm.engine.restart(system=system)  # `LLM(..., system=system)` would compile anew
            seconds = mean_ttft(llm, adapters)
            print(f"{name:15s} TTFT: short {1000 * seconds[SHORT]:4.0f} ms, long {1000 * seconds[LONG]:4.0f} ms")


if __name__ == "__main__":
    main()
