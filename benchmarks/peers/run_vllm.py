"""Run one pass of the comparison through vLLM's CPU build: `python run_vllm.py WORK OUT`, started by compare.py."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def serve(engine, work: Path, requests: list[dict], concurrency: int, tag: str) -> dict:
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
            lora = LoRARequest(adapter, int(adapter[1:]) + 1, str(work / "adapters" / adapter)) if adapter else None
            params = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False)
            running[f"{tag}-{i}"] = i
            sent[i] = time.perf_counter()
            prompt = {"prompt_token_ids": request["prompt_token_ids"]}
            engine.add_request(f"{tag}-{i}", prompt, params, lora_request=lora)
        for output in engine.step():
            i = running[output.request_id]
            if output.outputs[0].token_ids:
                ttft[i] = ttft[i] or time.perf_counter() - sent[i]
            if output.finished:
                tokens[i] = list(output.outputs[0].token_ids)
                del running[output.request_id]
    return {"seconds": time.perf_counter() - begin, "ttft": ttft, "tokens": tokens}


def main() -> None:
    work, out = Path(sys.argv[1]), Path(sys.argv[2])
    workloads = json.loads((work / "workloads.json").read_text())
    llm = LLM(
        model=str(work / "model"),
        dtype="float32",
        max_model_len=320,
        max_num_seqs=32,
        enable_lora=True,
        max_loras=16,
        max_lora_rank=8,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    results = {}
    for workload in workloads:
        name, concurrency = workload["name"], workload["concurrency"]
        short = [{**r, "max_tokens": 2} for r in workload["requests"]]
        serve(llm.llm_engine, work, short, concurrency, f"warm-{name}")
        results[name] = serve(llm.llm_engine, work, workload["requests"], concurrency, name)
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
