"""Cost of serving beside computing: the same requests through the bare loop, over HTTP and over gRPC, by turns.

All go to one engine. The bare loop runs on the engine's own thread with no client; clients are a process of their own on the
same machine, so that their work counts against the servers.

Throughput is measured with requests that arrive as others end, 32 at a time, over all passes together. Times to first token are
measured with requests that arrive at random times, the same for all three ways, at 70 % of the bare loop's throughput; they are
the median of each pass. (If requests arrive as others end, the bare loop admits the next before its next step, a server after
it.)

On a machine without a GPU the model computes on the cores that serve. With `--device-step` every step takes that long on a
device that only waits, and the host works as it would beside a GPU.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import uvloop

from benchmarks.demo import ADAPTERS
from benchmarks.machine import Out, describe, publish
from benchmarks.overhead.paced import pace
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import LoRARequest, SamplingParams
from chameleon_jax.serving.async_llm import AsyncLLM
from chameleon_jax.serving.engine import LLMEngine
from chameleon_jax.serving.server import Server, listen
from chameleon_jax.serving.service.server_config import ServerConfig
from chameleon_jax.serving.service.service import Service
from chameleon_jax.serving.telemetry.metrics import Metrics

LOAD = 0.7
"""Load of requests that arrive at random times, as a share of the bare loop's throughput."""


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


def bare(engine: LLMEngine, requests: list[dict[str, Any]], concurrency: int, base: str) -> dict[str, Any]:
    """Keep `concurrency` requests in the loop until all are done; a request with a time arrives then."""
    waiting = list(reversed(requests))
    begin, running = engine.clock(), 0
    done: list[Request] = []
    while waiting or running:
        while waiting and running < concurrency:
            due = begin + waiting[-1]["at"] if "at" in waiting[-1] else engine.clock()
            if due > engine.clock():
                if not running:
                    time.sleep(due - engine.clock())
                break
            request = waiting.pop()
            params = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True)
            lora = None if request["lora"] == base else LoRARequest(request["lora"])
            engine.submit(request["prompt_token_ids"], params, lora, arrival_time=due)
            running += 1
        ended = {r.request_id: r for r in engine.loop.step() if r.finish_reason is not None}.values()
        done += ended
        running -= len(ended)
    ttft = [r.metrics.first_token_time - r.metrics.arrival_time for r in done if r.metrics.first_token_time is not None]
    return {"seconds": engine.clock() - begin, "ttft": ttft}


Outcomes = dict[str, list[dict[str, Any]]]
"""Outcomes by way, one a pass."""


async def measure(
    llm: AsyncLLM, service: Service, requests: list[dict[str, Any]], concurrency: int, passes: int
) -> tuple[Outcomes, Outcomes]:
    """Measure requests that arrive as others end, and requests that arrive at random times."""
    server = Server(service, listen(service.config), Metrics())
    await server.start()
    running = asyncio.create_task(server.run())
    targets = {"http": f"127.0.0.1:{server.port}", "grpc": f"127.0.0.1:{server.grpc_port}"}

    async def by_turns(requests: list[dict[str, Any]], concurrency: int, unmeasured: int) -> Outcomes:
        outcomes: Outcomes = {"bare loop": [], "http": [], "grpc": []}
        for number in range(-unmeasured, passes):
            kinds = list(outcomes)
            for kind in kinds[number % 3 :] + kinds[: number % 3]:
                cpu = time.process_time()
                if kind in targets:
                    outcome = await asyncio.to_thread(through_clients, kind, targets[kind], requests, concurrency)
                else:
                    outcome = await llm.call(lambda engine: bare(engine, requests, concurrency, service.model_name))
                outcome["server_cpu_seconds"] = time.process_time() - cpu
                if number >= 0:
                    outcomes[kind].append(outcome)
                print(f"pass {number}, {kind}: {outcome['seconds']:.2f} s", file=sys.stderr, flush=True)
        return outcomes

    closed = await by_turns(requests, concurrency, unmeasured=1)
    rate = LOAD * len(requests) * passes / sum(o["seconds"] for o in closed["bare loop"])
    times = np.cumsum(np.random.default_rng(0).exponential(1 / rate, len(requests)))
    timed = [request | {"at": at} for request, at in zip(requests, times.tolist())]
    opened = await by_turns(timed, len(requests), unmeasured=0)
    server.stop()
    await running
    return closed, opened


def through_clients(kind: str, target: str, requests: list[dict[str, Any]], concurrency: int) -> dict[str, Any]:
    """Measurements of clients in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        file, result = Path(folder) / "task.json", Path(folder) / "result.json"
        task = {"protocol": kind, "target": target, "requests": requests, "concurrency": concurrency}
        file.write_text(json.dumps(task))
        subprocess.run([sys.executable, "-m", "benchmarks.overhead.clients", str(file), str(result)], check=True)
        return json.loads(result.read_text())


def table(closed: Outcomes, opened: Outcomes, tokens: int) -> list[dict[str, Any]]:
    def throughput(kind: str) -> float:
        return tokens * len(closed[kind]) / sum(o["seconds"] for o in closed[kind])

    def ttfts(kind: str) -> list[float]:
        return [1e3 * float(np.median(o["ttft"])) for o in opened[kind]]

    def ttft(kind: str) -> float:
        return float(np.median(ttfts(kind)))

    def cpu(kind: str) -> float:
        return sum(o["server_cpu_seconds"] for o in closed[kind]) / len(closed[kind])

    return [
        {
            "through": kind,
            "output tokens/s": round(throughput(kind), 1),
            "of the bare loop": f"{throughput(kind) / throughput('bare loop'):.3f}",
            "passes, s": " ".join(f"{o['seconds']:.2f}" for o in closed[kind]),
            "TTFT P50, ms": round(ttft(kind), 1),
            "more, ms": round(ttft(kind) - ttft("bare loop"), 1),
            "of passes, ms": " ".join(f"{t:.1f}" for t in ttfts(kind)),
            "server's CPU more a token, us": round(1e6 * (cpu(kind) - cpu("bare loop")) / tokens),
        }
        for kind in closed
    ]


def main(
    model: Annotated[str, typer.Option(help="Preset, GGUF file, Hugging Face or Orbax directory, or hub id.")] = "smollm2-135m",
    load_format: Annotated[
        str, typer.Option(help="auto reads the checkpoint; dummy draws random weights and serves no adapters.")
    ] = "auto",
    requests: Annotated[int, typer.Option(help="Requests in a pass.")] = 96,
    concurrency: Annotated[int, typer.Option(help="Requests that run at once, at most.")] = 32,
    output_len: Annotated[int, typer.Option(help="Output tokens of each request.")] = 32,
    passes: Annotated[int, typer.Option(help="Passes measured for each way: the bare loop, HTTP and gRPC.")] = 5,
    device_step: Annotated[
        float | None, typer.Option(help="Time of every step, seconds, on a device that only waits (default: the real device).")
    ] = None,
    out: Out = None,
) -> None:
    """Measure the cost of HTTP and gRPC beside the bare serving loop."""
    shape = {"model": model, "requests": requests, "concurrency": concurrency, "output_len": output_len, "passes": passes}
    llm = AsyncLLM(
        model,
        load_format=load_format,
        compile_programs="ahead",
        max_model_len=64 + output_len,
        max_num_batched_tokens=128,
        max_num_seqs=concurrency,
    )
    if device_step is not None:
        pace(llm.engine, device_step)
    config = ServerConfig(port=0, grpc_port=0, adapter_dirs=() if load_format == "dummy" else (str(ADAPTERS),))

    async def run() -> tuple[Outcomes, Outcomes]:
        service = Service(llm, config)
        await service.load_named({})
        names = [service.model_name, *await llm.list_loras()]
        drawn = make_requests(requests, names, output_len, llm.model_config.vocab_size)
        return await measure(llm, service, drawn, concurrency, passes)

    try:
        closed, opened = uvloop.run(run())
    finally:
        llm.close()
    rows = table(closed, opened, requests * output_len)
    publish(describe() | shape | {"device_step": device_step, "table": rows}, out)
