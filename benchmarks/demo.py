"""The main job in one command: one base model, four adapters of different ranks, an open stream of requests.

`python -m benchmarks.demo` serves SmolLM2-135M-Instruct. Requests arrive at random times whether or not earlier ones are done
(Poisson), each for the base model or for one adapter; whatever is there at a step runs in one batch.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from chameleon_jax.config import EngineConfig
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import LoRARequest, SamplingParams
from chameleon_jax.serving.engine import LLMEngine

ADAPTERS = Path(__file__).parent / "demo_adapters"
BASE = "(base model)"
SHOWN_PROMPT = "The heart of man is"
PROMPTS = (
    SHOWN_PROMPT,
    "Love is",
    "In the beginning of the year, the people",
    "And when the king had heard these words, he",
    "A friend is somebody who",
    "To sleep, to dream, to wake again: the night",
    "The law of the land says that every man",
    "def read_lines(path):",
    "My lord, I bring you news of the war.",
    "HAPPINESS, n.",
)


def arrivals(count: int, rate: float, names: list[str], seed: int) -> list[tuple[float, str, str, int]]:
    """`(seconds, adapter, prompt, output tokens)` in order; every name first answers SHOWN_PROMPT, so that one can compare."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, count))
    plan = []
    for i, at in enumerate(times.tolist()):
        name = names[i] if i < len(names) else names[rng.integers(len(names))]
        prompt = SHOWN_PROMPT if i < len(names) else PROMPTS[rng.integers(len(PROMPTS))]
        plan.append((at, name, prompt, int(rng.integers(24, 64))))
    return plan


def serve(engine: LLMEngine, plan: list[tuple[float, str, str, int]], console: Console) -> list[Request]:
    """Runs the stream in real time, showing the first text of each adapter as it grows."""
    names = list(dict.fromkeys(name for _, name, _, _ in plan))
    shown: dict[str, Request] = {}
    requests: list[Request] = []
    bar = Progress(TextColumn("finished"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    task = bar.add_task("", total=len(plan), state="")

    def picture() -> Group:
        panels = [
            Panel(f"[dim]{SHOWN_PROMPT}[/dim]{shown[n].text if n in shown else ''}", title=n, width=56, height=8) for n in names
        ]
        return Group(Columns(panels), bar)

    begin = engine.clock()
    waiting = list(reversed(plan))
    with Live(picture(), console=console, refresh_per_second=8) as live:
        while waiting or engine.loop.has_unfinished:
            while waiting and begin + waiting[-1][0] <= engine.clock():
                at, name, prompt, tokens = waiting.pop()
                params = SamplingParams(temperature=0.7, top_p=0.95, seed=len(requests), max_tokens=tokens)
                ids = engine.tokenizer.encode(prompt) if engine.tokenizer is not None else []
                lora = None if name == BASE else LoRARequest(name)
                request = engine.submit(ids, params, lora, arrival_time=begin + at)
                requests.append(request)
                shown.setdefault(name, request)
            if engine.loop.has_unfinished:
                engine.loop.step()
            else:
                time.sleep(0.002)
            running, queued = len(list(engine.loop.scheduler.running)), engine.loop.scheduler.num_waiting
            usage = engine.loop.pool.usage()
            state = f"running {running}, queued {queued}; pages: KV {usage.kv}, adapters {usage.adapters}, free {usage.free}"
            bar.update(task, completed=engine.loop.counters.finished, state=state)
            live.update(picture())
    return requests


def report(engine: LLMEngine, requests: list[Request]) -> Table:
    """One row for each adapter, and totals."""
    table = Table(title="One batch engine, every adapter", show_footer=True)
    by_name: dict[str, list[Request]] = defaultdict(list)
    for request in requests:
        by_name[request.adapter_name or BASE].append(request)
    rows = []
    for name in sorted(by_name):
        group = by_name[name]
        info = engine.adapters.get(name)
        hits = [bool(r.metrics.adapter_was_resident) for r in group if r.adapter is not None]
        loads = engine.loop.cache.entry(info.content_hash).loads if info else 0
        rank = str(info.rank) if info else "-"
        rows.append(
            [
                name,
                str(len(group)),
                rank,
                *_times(group),
                f"{sum(hits)}/{len(hits)}" if info else "-",
                str(loads) if info else "-",
            ]
        )
    counters = engine.loop.cache.counters
    total = [
        "total",
        str(len(requests)),
        "",
        *_times(requests),
        f"{counters.hits}/{counters.hits + counters.misses}",
        str(counters.loads),
    ]
    for i, title in enumerate(("adapter", "requests", "rank", "TTFT p50 ms", "TTFT p99 ms", "tokens/s", "cache hits", "loads")):
        table.add_column(title, total[i], justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _times(group: list[Request]) -> list[str]:
    ttft = [(r.metrics.first_token_time or 0.0) - r.arrival_time for r in group]
    first, last = min(r.arrival_time for r in group), max(r.metrics.finished_time or 0.0 for r in group)
    tokens = sum(len(r.output_token_ids) for r in group)
    return [
        f"{np.percentile(ttft, 50) * 1e3:.0f}",
        f"{np.percentile(ttft, 99) * 1e3:.0f}",
        f"{tokens / (last - first):.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console = Console()
    config = EngineConfig(max_num_seqs=16, max_model_len=256, max_num_batched_tokens=128, num_pages=260, max_lora_rank=16)
    with console.status("starting") as status:
        begin = time.perf_counter()
        engine = LLMEngine(
            "smollm2-135m", config, progress=lambda done, total: status.update(f"compiling programs {done}/{total}")
        )
    console.print(
        f"SmolLM2-135M-Instruct is up after {time.perf_counter() - begin:.1f} s (compiled programs are kept for the next start)"
    )
    for directory in sorted(d for d in ADAPTERS.iterdir() if d.is_dir()):
        info = engine.add_lora(directory.name, directory)
        console.print(f"adapter {directory.name}: rank {info.rank}, {info.num_bytes / 2**20:.1f} MiB in the pool")
    names = [BASE, *engine.list_loras()]
    requests = serve(engine, arrivals(args.requests, args.rate, names, args.seed), console)
    console.print(report(engine, requests))
    done = engine.loop.counters
    rows = done.decode_rows / max(1, done.steps)
    console.print(
        f"{done.generation_tokens} tokens in {done.steps} steps, {rows:.1f} rows decoded a step, "
        f"{done.prefill_tokens} prompt tokens; {engine.loop.cache.counters.evictions} evictions"
    )
    engine.close()


if __name__ == "__main__":
    main()
