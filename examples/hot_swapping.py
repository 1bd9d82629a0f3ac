"""Serve more adapters than the device pool holds; replace one while requests run, pin and remove others between waves.

Run: python examples/hot_swapping.py

Prints the resident adapters and the pool's use after each wave of requests: recent and pinned adapters stay, others are evicted
and load again on demand. The model has random weights, so tokens mean nothing; memory moves as with a real one.
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from chameleon_jax import AsyncLLM, LoRARequest, SamplingParams
from chameleon_jax.checkpoints.finetune import FinetuneConfig, init_adapter, save
from chameleon_jax.models.config import PRESETS

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def write_adapter(directory: Path, seed: int) -> Path:
    """Write an untrained adapter of rank 8 in PEFT's format."""
    config = FinetuneConfig(rank=8, seed=seed)
    save(init_adapter(PRESETS["tiny"], config), directory, config, "tiny", "float32")
    return directory


async def wave(llm: AsyncLLM, names: list[str]) -> None:
    """Run one request for each name at once, then print the residency."""

    async def request(name: str) -> None:
        async for _ in llm.generate(list(range(3, 19)), PARAMS, LoRARequest(name)):
            pass

    await asyncio.gather(*map(request, names))
    stats = await llm.stats(max_age=0)
    resident = [adapter.names[0] for adapter in stats.adapters if adapter.tier == "resident"]
    print(f"{len(resident):2d} of {len(stats.adapters)} resident: {' '.join(resident)}")
    cache, pool = stats.cache, stats.pool
    print(f"   loads {cache.loads}, evictions {cache.evictions}; pages: adapters {pool.adapters}, free {pool.free}")


async def serve(folder: Path) -> None:
    """Load 16 adapters into host memory and use them in waves."""
    settings: dict[str, Any] = dict(
        load_format="dummy",
        max_num_seqs=4,
        max_model_len=64,
        max_num_batched_tokens=32,
        max_lora_rank=8,
        compile_programs="lazy",
    )
    async with AsyncLLM("tiny", num_pages=120, **settings) as llm:
        names = [f"tenant-{i:02d}" for i in range(16)]
        await asyncio.gather(*(llm.add_lora(name, write_adapter(folder / name, i)) for i, name in enumerate(names)))
        await wave(llm, names[:4])
        await llm.pin_lora(names[0])  # stays, however rarely it is used
        await wave(llm, names[4:])
        await asyncio.gather(wave(llm, names[:4]), llm.add_lora(names[5], write_adapter(folder / "new", 99)))
        await llm.remove_lora(names[6])
        await wave(llm, names[:6])


def main() -> None:
    """Keep the adapters' files in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(serve(Path(folder)))


if __name__ == "__main__":
    main()
