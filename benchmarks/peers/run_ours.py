"""Run one pass of the comparison through this project: `python run_ours.py WORK OUT`, started by compare.py."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from chameleon_jax.config import EngineConfig
from chameleon_jax.sampling_params import LoRARequest, SamplingParams
from chameleon_jax.serving.engine import LLMEngine


def serve(engine: LLMEngine, work: Path, requests: list[dict], concurrency: int) -> dict:
    """Keep `concurrency` requests in flight; times are seconds."""
    waiting = list(enumerate(requests))[::-1]
    sent: dict[int, float] = {}
    running: dict[str, int] = {}
    ttft = [0.0] * len(requests)
    tokens: list[list[int]] = [[]] * len(requests)
    begin = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < concurrency:
            i, request = waiting.pop()
            adapter = request["adapter"]
            lora = LoRARequest(adapter, str(work / "adapters" / adapter)) if adapter else None
            params = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True)
            running[engine.submit(request["prompt_token_ids"], params, lora).request_id] = i
            sent[i] = time.perf_counter()
        for served in engine.loop.step():
            i = running[served.request_id]
            ttft[i] = ttft[i] or time.perf_counter() - sent[i]
            if served.finish_reason is not None:
                tokens[i] = served.output_token_ids
                del running[served.request_id]
    return {"seconds": time.perf_counter() - begin, "ttft": ttft, "tokens": tokens}


def main() -> None:
    work, out = Path(sys.argv[1]), Path(sys.argv[2])
    workloads = json.loads((work / "workloads.json").read_text())
    config = EngineConfig(
        dtype="float32", max_model_len=320, max_num_seqs=32, max_lora_rank=8, system="fifo", compile_programs="ahead"
    )
    engine = LLMEngine(str(work / "model"), config)
    results = {}
    for workload in workloads:
        short = [{**r, "max_tokens": 2} for r in workload["requests"]]
        serve(engine, work, short, workload["concurrency"])
        results[workload["name"]] = serve(engine, work, workload["requests"], workload["concurrency"])
    engine.close()
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
