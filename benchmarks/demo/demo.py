"""One base model and four adapters of different ranks under an open stream of requests, drawn in the terminal.

Requests arrive at random times (Poisson), whether or not earlier ones are done, each for the base model or for one adapter. All
that are admitted at a step run in one batch.
"""

from __future__ import annotations

import time
from typing import Annotated, NamedTuple

import numpy as np
import typer
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from benchmarks.demo import ADAPTERS, PROMPTS, SHOWN_PROMPT
from chameleon_jax.config import EngineConfig
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import LoRARequest, SamplingParams
from chameleon_jax.serving.engine import LLMEngine

BASE = "(base model)"
COLUMNS = ("adapter", "requests", "rank", "TTFT p50 ms", "TTFT p99 ms", "tokens/s", "cache hits", "loads")


class Arrival(NamedTuple):
    """A request to come, at `seconds` from the start."""

    seconds: float
    adapter: str
    prompt: str
    tokens: int


def arrivals(count: int, rate: float, names: list[str], seed: int) -> list[Arrival]:
    """Draw requests in order of arrival; every name first answers SHOWN_PROMPT, so that the texts can be compared."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, count))
    plan = []
    for i, at in enumerate(times.tolist()):
        name = names[i] if i < len(names) else names[rng.integers(len(names))]
        prompt = SHOWN_PROMPT if i < len(names) else PROMPTS[rng.integers(len(PROMPTS))]
        plan.append(Arrival(at, name, prompt, int(rng.integers(24, 64))))
    return plan


def serve(engine: LLMEngine, plan: list[Arrival], console: Console) -> list[Request]:
    """Serve the stream in real time, and draw the first text of each adapter as it grows."""
    names = list(dict.fromkeys(arrival.adapter for arrival in plan))
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
            while waiting and begin + waiting[-1].seconds <= engine.clock():
                arrival = waiting.pop()
                request = submit(engine, arrival, seed=len(requests), due=begin + arrival.seconds)
                requests.append(request)
                shown.setdefault(arrival.adapter, request)
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


def submit(engine: LLMEngine, arrival: Arrival, seed: int, due: float) -> Request:
    params = SamplingParams(temperature=0.7, top_p=0.95, seed=seed, max_tokens=arrival.tokens)
    ids = engine.tokenizer.encode(arrival.prompt) if engine.tokenizer is not None else []
    lora = None if arrival.adapter == BASE else LoRARequest(arrival.adapter)
    return engine.submit(ids, params, lora, arrival_time=due)


def report(engine: LLMEngine, requests: list[Request]) -> Table:
    """One row for each adapter, and totals."""
    by_name: dict[str, list[Request]] = {}
    for request in requests:
        by_name.setdefault(request.adapter_name or BASE, []).append(request)
    rows = [_row(engine, name, by_name[name]) for name in sorted(by_name)]
    counters = engine.loop.cache.counters
    hits = f"{counters.hits}/{counters.hits + counters.misses}"
    total = ["total", str(len(requests)), "", *_times(requests), hits, str(counters.loads)]
    table = Table(title="One batch engine, every adapter", show_footer=True)
    for i, title in enumerate(COLUMNS):
        table.add_column(title, total[i], justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _row(engine: LLMEngine, name: str, group: list[Request]) -> list[str]:
    info = engine.adapters.get(name)
    if info is None:
        return [name, str(len(group)), "-", *_times(group), "-", "-"]
    hits = [bool(r.metrics.adapter_was_resident) for r in group]
    loads = engine.loop.cache.entry(info.content_hash).loads
    return [name, str(len(group)), str(info.rank), *_times(group), f"{sum(hits)}/{len(hits)}", str(loads)]


def _times(group: list[Request]) -> list[str]:
    ttft = [(r.metrics.first_token_time or 0.0) - r.arrival_time for r in group]
    first, last = min(r.arrival_time for r in group), max(r.metrics.finished_time or 0.0 for r in group)
    tokens = sum(len(r.output_token_ids) for r in group)
    p50, p99 = np.percentile(ttft, [50, 99]) * 1e3
    return [f"{p50:.0f}", f"{p99:.0f}", f"{tokens / (last - first):.1f}"]


def main(
    requests: Annotated[int, typer.Option(help="Requests to serve.")] = 48,
    rate: Annotated[float, typer.Option(help="Mean rate of arrivals, requests a second.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed of prompts, models and arrival times.")] = 0,
) -> None:
    """Serve a stream of requests with one model and four adapters."""
    console = Console()
    config = EngineConfig(max_num_seqs=16, max_model_len=256, max_num_batched_tokens=128, num_pages=260, max_lora_rank=16)
    with console.status("starting") as status:
        begin = time.perf_counter()
        engine = LLMEngine(
            "smollm2-135m", config, progress=lambda done, total: status.update(f"compiling programs {done}/{total}")
        )
    seconds = time.perf_counter() - begin
    console.print(f"SmolLM2-135M-Instruct is up after {seconds:.1f} s")
    programs = engine.runner.programs
    begun = programs.num_compiled
    for directory in sorted(d for d in ADAPTERS.iterdir() if d.is_dir()):
        info = engine.add_lora(directory.name, directory)
        console.print(f"adapter {directory.name}: rank {info.rank}, {info.num_bytes / 2**20:.1f} MiB in the pool")
    served = serve(engine, arrivals(requests, rate, [BASE, *engine.list_loras()], seed), console)
    console.print(report(engine, served))
    done = engine.loop.counters
    rows = done.decode_rows / max(1, done.steps)
    console.print(
        f"{done.generation_tokens} tokens in {done.steps} steps, {rows:.1f} rows decoded a step, "
        f"{done.prefill_tokens} prompt tokens; {engine.loop.cache.counters.evictions} evictions"
    )
    total, now = programs.num_programs, programs.num_compiled
    if begun < total:
        console.print(
            f"{begun} of {total} programs were compiled at the first request, {now} at the last. Until all are, steps take "
            "longer; the next start finds these in the cache."
        )
    engine.close()
