"""Server under load for a long time, while adapters come and go.

64 clients of both protocols, in a process of their own, ask a base model and adapters; some leave in mid stream, some have
deadlines that are too short. All the while adapters are loaded, replaced by others under the same name, and unloaded. Every
text is compared with the offline engine's. When nothing runs any more, pages, host bytes, threads, file descriptors and memory
must be as they were after a first minute of the same load.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from benchmarks.demo import ADAPTERS, PROMPTS
from benchmarks.machine import Out, describe, publish
from benchmarks.soak.jobs import Jobs, prepare
from benchmarks.soak.watch import Holding, StepTimes
from chameleon_jax.checkpoints import peft
from chameleon_jax.serving.async_llm import AsyncLLM
from chameleon_jax.serving.server import Server, listen
from chameleon_jax.serving.service.server_config import ServerConfig
from chameleon_jax.serving.service.service import Service
from chameleon_jax.serving.telemetry.metrics import Metrics

RSS_SLACK_MIB = 64
STRENGTHS = (0.6, 0.8)
POOL_PAGES = 400
"""Small enough that running requests push idle adapters out."""


@dataclasses.dataclass(frozen=True)
class Soak:
    """Extent of a soak.

    Attributes:
        clients: Clients that ask at the same time.
        names: Adapters that come and go.
        warm_up: Seconds of load before anything is compared.
        seconds: Seconds of load.
        pause: Mean seconds between two changes of adapters.
    """

    clients: int = 64
    names: int = 8
    warm_up: float = 60.0
    seconds: float = 600.0
    pause: float = 0.2


async def soak(llm: AsyncLLM, adapter_dir: Path, jobs: Jobs, plan: Soak) -> dict[str, Any]:
    """Serve the clients, and return the observations of clients and process."""
    config = ServerConfig(port=0, grpc_port=0, adapter_dirs=(str(adapter_dir),))
    service = Service(llm, config)
    await service.load_named({})
    server = Server(service, listen(config), Metrics())
    await server.start()
    running = asyncio.create_task(server.run())
    with tempfile.TemporaryDirectory() as folder:
        jobs.save(Path(folder) / "jobs.json")
        await _clients(Path(folder), server, plan, plan.warm_up, seed=1)
        before = await _settled(llm)
        times = StepTimes(llm)
        seen = await _clients(Path(folder), server, plan, plan.seconds, seed=2)
        after = await _settled(llm)
    server.stop()
    drained = await running
    stats = await llm.stats(max_age=0)
    return {
        **seen,
        "drained": drained,
        "faults": stats.loop.faults,
        "loads": stats.cache.loads,
        "evictions": stats.cache.evictions,
        "held_before": dataclasses.asdict(before),
        "held_after": dataclasses.asdict(after),
        "milliseconds": times.summary(),
    }


async def _clients(folder: Path, server: Server, plan: Soak, seconds: float, seed: int) -> dict[str, Any]:
    task: dict[str, Any] = {"clients": plan.clients, "names": plan.names, "pause": plan.pause, "seconds": seconds, "seed": seed}
    task |= {"url": f"http://127.0.0.1:{server.port}", "grpc": f"127.0.0.1:{server.grpc_port}"}
    (folder / "task.json").write_text(json.dumps(task))
    await asyncio.to_thread(subprocess.run, [sys.executable, "-m", "benchmarks.soak.clients", str(folder)], check=True)
    return json.loads((folder / "result.json").read_text())


async def _settled(llm: AsyncLLM) -> Holding:
    while (stats := await llm.stats(max_age=0)).running or stats.waiting:
        await asyncio.sleep(0.1)
    await asyncio.sleep(1)  # connections of the clients that left
    return await Holding.of(llm)


def failures(result: dict[str, Any]) -> list[str]:
    """Failures that the result of a soak shows."""
    before, after = result["held_before"], result["held_after"]
    found = [f"wrong text: {text}" for text in result["wrong_texts"]] + [f"error: {text}" for text in result["errors"]]
    for name in ("kv_pages", "adapters", "host_bytes", "threads", "file_descriptors"):
        if after[name] > before[name]:
            found.append(f"{name} grew from {before[name]} to {after[name]}")
    if after["rss_mib"] > before["rss_mib"] + RSS_SLACK_MIB:
        found.append(f"memory grew from {before['rss_mib']} to {after['rss_mib']} MiB")
    if not any(count for kind, count in result["requests"].items() if not kind.startswith("refused")):
        found.append("no request was answered")
    if result["faults"]:
        found.append(f"the device failed {result['faults']} times")
    if not result["drained"]:
        found.append("the server did not finish its running requests")
    return found


def vary(adapters: Path, out: Path) -> list[str]:
    """Write each adapter at several strengths: contents of the changing names alone, so that they come and go."""
    contents = []
    for directory in sorted(path for path in adapters.iterdir() if path.is_dir()):
        for strength in STRENGTHS:
            variant = out / f"{directory.name}-{strength}"
            shutil.copytree(directory, variant)
            file = variant / peft.CONFIG_FILE
            config = json.loads(file.read_text())
            file.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * strength}))
            contents.append(str(variant))
    return contents


def main(
    minutes: Annotated[float, typer.Option(help="Time of load, minutes.")] = 10,
    clients: Annotated[int, typer.Option(help="Clients that send requests at the same time.")] = 64,
    out: Out = None,
) -> int:
    """Serve 64 clients for minutes while adapters come and go.

    The exit code is 1 if anything was wrong.
    """
    logging.basicConfig(level=logging.WARNING)
    settings: dict[str, Any] = {"max_model_len": 256, "max_num_batched_tokens": 128, "num_pages": POOL_PAGES}
    settings["compile_programs"] = "ahead"  # threads and memory are counted
    prompts = [(prompt, 16 + 16 * (i % 4)) for i, prompt in enumerate(PROMPTS)]
    plan = Soak(clients=clients, seconds=60 * minutes)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "adapters"
        shutil.copytree(ADAPTERS, root)
        fixed = [str(path) for path in sorted(root.iterdir()) if path.is_dir()]
        changing = vary(ADAPTERS, root / "variants")
        jobs = prepare("smollm2-135m", prompts, fixed, changing, settings)
        llm = AsyncLLM("smollm2-135m", **settings)
        try:
            result = uvloop.run(soak(llm, root, jobs, plan))
        finally:
            llm.close()
    rows = [{"milliseconds": interval, **times} for interval, times in result.pop("milliseconds").items()]
    publish(describe() | {"plan": dataclasses.asdict(plan)} | result | {"table": rows}, out)
    found = failures(result)
    print("\n".join(found) if found else "correct: texts, pages, host bytes, threads, file descriptors, memory")
    return int(bool(found))
