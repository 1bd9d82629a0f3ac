"""Process that the section `startup` times: it builds an engine as serving does, and prints the times."""

from __future__ import annotations

import json
import sys
import time

import jax
import jax.numpy as jnp

from benchmarks.device.scale import FULL, SCALES, Scale
from chameleon_jax.config import EngineConfig
from chameleon_jax.models import llama
from chameleon_jax.models.config import TARGETS
from chameleon_jax.models.page_layout import PageLayout
from chameleon_jax.models.runtime.buckets import StepBuckets, shapes_for
from chameleon_jax.models.runtime.model_runner import ModelRunner
from chameleon_jax.models.runtime.step_inputs import SamplingRow, SequenceChunk


def buckets(scale: Scale, layout: PageLayout) -> StepBuckets:
    """Buckets of serving's defaults, or fewer for the small scale."""
    defaults = EngineConfig()
    small = scale != FULL
    rank = scale.max_rank
    return StepBuckets(
        max_num_seqs=1 if small else defaults.max_num_seqs,
        max_prefill_tokens=scale.prefill_tile if small else defaults.max_num_batched_tokens,
        table_width=layout.pages_for_tokens(scale.max_tokens),
        max_rank=rank,
        max_adapter_pages=layout.place(dict.fromkeys(TARGETS, rank)).num_pages,
        **(shapes_for("triton") if not small else {}) | {"prefill_tile": scale.prefill_tile},
    )


def build(scale: Scale) -> dict[str, float]:
    """Build the engine, and return seconds and sizes."""
    begin = time.perf_counter()
    device, dtype = jax.devices()[0], jnp.dtype(scale.dtype)
    found = {"s to reach the device": time.perf_counter() - begin}

    def lap(name: str, begin: float) -> None:
        found[name] = time.perf_counter() - begin

    begin = time.perf_counter()
    model = jax.block_until_ready(llama.random_model(scale.config, dtype))
    lap("s for the weights", begin)
    weights = (device.memory_stats() or {}).get("bytes_in_use", 0)
    layout = PageLayout.for_model(scale.config)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    compiling = time.perf_counter()
    programs = 0

    def progress(done: int, total: int) -> None:
        nonlocal programs
        programs = total
        print(f"{done} of {total} programs after {time.perf_counter() - compiling:.1f} s", flush=True)

    num_pages = None if limit else scale.prompt_tokens
    engine = ModelRunner(model, layout, buckets(scale, layout), num_pages, dtype, progress, memory_limit=limit or 0)
    engine.block_until_ready()
    lap("s for programs and pool", compiling)
    begin = time.perf_counter()
    chunk = SequenceChunk([1] * 5, 0, 0, tuple(range(1, 3)), None)
    engine.run([chunk], {0: SamplingRow(0, 5, 0, 0.0, 0, 1.0, 0.0, (), False)})
    engine.block_until_ready()
    lap("s for the first step", begin)
    pool = engine.num_pages * layout.page_bytes(dtype.itemsize)
    gib = {"GiB of weights": weights, "GiB of the pool": pool}
    if limit:
        gib["GiB left for scratch"] = limit - weights - pool
    rounded = {name: round(value, 2) for name, value in found.items()}
    return {"programs": programs, **rounded} | {name: round(value / 2**30, 2) for name, value in gib.items()}


if __name__ == "__main__":
    print(json.dumps(build(SCALES[sys.argv[1]])), flush=True)
