"""The overhead benchmark on a small model: it asks all three ways for the same, and its table adds up."""

from __future__ import annotations

import asyncio

from benchmarks.overhead.__main__ import make_requests, measure, table
from chameleon_jax.serving.async_llm import AsyncLLM
from chameleon_jax.serving.server_config import ServerConfig
from chameleon_jax.serving.service import Service
from tests import reference_models as reference


def test_three_ways_for_the_same_requests(tmp_path):
    model = str(reference.save_model(tmp_path / "gqa", "gqa", text=True))
    settings = dict(dtype="float32", max_model_len=128, max_num_seqs=8, max_num_batched_tokens=64, num_pages=200)
    llm = AsyncLLM(model, progress=lambda done, total: None, **settings)

    async def main():
        reference.save_adapter(tmp_path / "adapters" / "a", reference.CONFIGS["gqa"], 8)
        service = Service(llm, ServerConfig(port=0, grpc_port=0, adapter_dirs=(str(tmp_path / "adapters"),)))
        await service.load_named({})
        requests = make_requests(10, ["gqa", "a"], 6, 256)
        before = (await llm.stats(max_age=0)).generation_tokens
        outcomes = await measure(llm, service, requests, concurrency=4, passes=1)
        assert (await llm.stats(max_age=0)).generation_tokens - before == 2 * 3 * 10 * 6
        return outcomes

    outcomes = asyncio.run(main())
    llm.close()
    rows = {row["through"]: row for row in table(outcomes, 60)}
    assert set(rows) == {"bare loop", "http", "grpc"}
    for kind, (outcome,) in outcomes.items():
        assert len(outcome["ttft"]) == 10 and all(0 < t < outcome["seconds"] for t in outcome["ttft"])
        assert rows[kind]["output tokens/s"] == round(60 / outcome["seconds"], 1)
    assert rows["bare loop"]["of the bare loop"] == "1.000" and rows["bare loop"]["more, ms"] == 0
