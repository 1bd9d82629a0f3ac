"""What serving costs beside computing: `python -m benchmarks.overhead --out FILE`.

The same requests through the bare loop, over HTTP and over gRPC, 32 at a time, to one and the same engine, by turns in one run.
The bare loop runs on the engine's own thread with no client; clients are a process of their own on the same machine, so that
what they compute counts against the servers. Throughput is of all passes of a kind together, time to first token their median.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.demo import ADAPTERS
from benchmarks.machine import describe, publish
from chameleon_jax.request import LoRARequest, Request, SamplingParams
from chameleon_jax.serving.async_llm import AsyncLLM
from chameleon_jax.serving.engine import Engine
from chameleon_jax.serving.server import Server, listen
from chameleon_jax.serving.server_config import ServerConfig
from chameleon_jax.serving.service import Service
from chameleon_jax.serving.telemetry.metrics import Metrics


def make_requests(count: int, names: list[str], output_len: int, vocab: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt_token_ids": rng.integers(0, vocab, int(rng.integers(16, 64))).tolist(),
            "max_tokens": output_len,
            "lora": names[i % len(names)],
        }
        for i in range(count)
    ]


def bare(engine: Engine, requests: list[dict[str, Any]], concurrency: int, base: str) -> dict[str, Any]:
    """Keeps so many requests in the loop until all are done."""
    waiting = list(reversed(requests))
    begin, running = engine.clock(), 0
    done: list[Request] = []
    while waiting or running:
        while waiting and running < concurrency:
            request = waiting.pop()
            params = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True)
            lora = None if request["lora"] == base else LoRARequest(request["lora"])
            engine.submit(request["prompt_token_ids"], params, lora)
            running += 1
        ended = {r.request_id: r for r in engine.loop.step() if r.finish_reason is not None}.values()
        done += ended
        running -= len(ended)
    ttft = [r.metrics.first_token_time - r.metrics.arrival_time for r in done if r.metrics.first_token_time is not None]
    return {"seconds": engine.clock() - begin, "ttft": ttft, "cpu_seconds": 0.0}


async def measure(
    llm: AsyncLLM, service: Service, requests: list[dict[str, Any]], concurrency: int, passes: int
) -> dict[str, list[dict[str, Any]]]:
    server = Server(service, listen(service.config), Metrics())
    await server.start()
    running = asyncio.create_task(server.run())
    outcomes: dict[str, list[dict[str, Any]]] = {"bare loop": [], "http": [], "grpc": []}
    targets = {"http": f"127.0.0.1:{server.port}", "grpc": f"127.0.0.1:{server.grpc_port}"}
    with tempfile.TemporaryDirectory() as folder:
        file, result = Path(folder) / "requests.json", Path(folder) / "result.json"
        file.write_text(json.dumps(requests))
        for number in range(passes + 1):
            kinds = list(outcomes)
            for kind in kinds[number % 3 :] + kinds[: number % 3]:
                cpu = time.process_time()
                if kind in targets:
                    command = [sys.executable, "-m", "benchmarks.overhead.clients", kind, targets[kind], str(file), str(result)]
                    await asyncio.to_thread(subprocess.run, [*command, "--concurrency", str(concurrency)], check=True)
                    outcome = json.loads(result.read_text())
                else:
                    run = llm.call(lambda engine: bare(engine, requests, concurrency, service.model_name))
                    outcome = await run
                outcome["server_cpu_seconds"] = time.process_time() - cpu
                if number:  # the first round warms up
                    outcomes[kind].append(outcome)
                print(f"round {number}, {kind}: {outcome['seconds']:.2f} s", file=sys.stderr, flush=True)
    server.stop()
    await running
    return outcomes


def table(outcomes: dict[str, list[dict[str, Any]]], tokens: int) -> list[dict[str, Any]]:
    def throughput(kind: str) -> float:
        return tokens * len(outcomes[kind]) / sum(o["seconds"] for o in outcomes[kind])

    def ttft(kind: str) -> float:
        return 1e3 * float(np.median([np.median(o["ttft"]) for o in outcomes[kind]]))

    return [
        {
            "through": kind,
            "output tokens/s": round(throughput(kind), 1),
            "of the bare loop": f"{throughput(kind) / throughput('bare loop'):.3f}",
            "TTFT P50, ms": round(ttft(kind), 1),
            "more, ms": round(ttft(kind) - ttft("bare loop"), 1),
            "passes, s": " ".join(f"{o['seconds']:.2f}" for o in outcomes[kind]),
            "server CPU, s": round(float(np.mean([o["server_cpu_seconds"] for o in outcomes[kind]])), 2),
            "clients' CPU, s": round(float(np.mean([o["cpu_seconds"] for o in outcomes[kind]])), 2),
        }
        for kind in outcomes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights, for a preset that is not there")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    llm = AsyncLLM(args.model, load_format=args.load_format, max_model_len=128, max_num_batched_tokens=128)
    config = ServerConfig(port=0, grpc_port=0, adapter_dirs=() if args.load_format == "dummy" else (str(ADAPTERS),))

    async def run() -> dict[str, list[dict[str, Any]]]:
        service = Service(llm, config)
        await service.load_named({})
        names = [service.model_name, *await llm.list_loras()]
        requests = make_requests(args.requests, names, args.output_len, llm.model_config.vocab_size)
        return await measure(llm, service, requests, args.concurrency, args.passes)

    try:
        outcomes = uvloop.run(run())
    finally:
        llm.close()
    result = describe(f"python -m benchmarks.overhead {' '.join(sys.argv[1:])}".strip())
    shape = {name: getattr(args, name) for name in ("model", "requests", "concurrency", "output_len", "passes")}
    publish(result | shape | {"table": table(outcomes, args.requests * args.output_len)}, args.out)


if __name__ == "__main__":
    main()
