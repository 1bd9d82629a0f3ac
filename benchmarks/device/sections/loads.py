"""Section `loads`: adapters from pinned host memory into their pages, and decode steps while that goes on."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from benchmarks.device import predictions
from benchmarks.device.bench_engine import SCALE_OF_ROWS
from benchmarks.device.report import Case, Report, Row, Skip
from benchmarks.device.scale import Mix, Scale
from benchmarks.device.sections.machine import ceilings, device_kind
from benchmarks.device.workbench import Workbench, shared
from chameleon_jax.models.adapters.transfers import PinnedBlock
from chameleon_jax.models.config import ATTENTION_TARGETS, TARGETS

STEPS = 150
"""Decode steps, whose 99th percentile is taken."""
SECONDS = 3.0
"""Limit for these steps; fewer are run if they take longer."""
IDLE = "idle link"


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    bench = shared(scale)
    found = [Case(f"rank {rank}", functools.partial(one_by_one, bench, report, rank)) for rank in scale.load_ranks]
    rows = rows_meanwhile(scale)
    return [*found, Case(f"steps of {rows} rows meanwhile", functools.partial(meanwhile, bench, report, rows))]


def rows_meanwhile(scale: Scale) -> int:
    """Rows of the decode steps that run beside loads."""
    return scale.rows[len(scale.rows) // 2]


class Store:
    """Host store in which every adapter of a rank has the same block, staged once."""

    def __init__(self, bench: Workbench, targets: tuple[str, ...] = TARGETS):
        self._bench, self._targets = bench, targets
        self._blocks: dict[int, PinnedBlock] = {}

    def block(self, rank: int) -> PinnedBlock:
        if rank not in self._blocks:
            layout, dtype = self._bench.layout, self._bench.dtype
            placement = layout.place(dict.fromkeys(self._targets, rank))
            some = np.random.default_rng(rank).standard_normal(1 << 18, np.float32) * SCALE_OF_ROWS
            shape = (layout.config.num_layers, placement.num_pages, layout.page_elems)
            self._blocks[rank] = self._bench.engine.stage(np.resize(some.astype(dtype), shape))
        return self._blocks[rank]

    def put(self, content_hash: str, block: PinnedBlock) -> None:
        """Take a block that `block` made; it is kept already."""

    def fetch(self, content_hash: str) -> Future[PinnedBlock]:
        """Fetch the block of `name/rank`."""
        future: Future[PinnedBlock] = Future()
        future.set_result(self.block(int(content_hash.split("/")[1])))
        return future


def loads_of(bench: Workbench, store: Any) -> Any:
    from chameleon_jax.models.runtime.adapter_loads import AdapterLoads  # needs more packages than a model

    return AdapterLoads(bench.engine, store)


def one_by_one(bench: Workbench, report: Report, rank: int) -> list[Row]:
    """Time loads of all seven targets, from the begin of the load to the end of the last write."""
    store = Store(bench)
    block = store.block(rank)
    loads = loads_of(bench, store)
    pages = list(range(1, 1 + block.num_pages))
    samples = []
    for i in range(6):
        bench.engine.block_until_ready()
        begin = time.perf_counter()
        loads.begin(f"{i}/{rank}", pages)
        while not (ended := loads.poll(wait=True)):
            pass
        if ended[0].error is not None:
            raise ended[0].error
        bench.engine.block_until_ready()
        samples.append(time.perf_counter() - begin)
    seconds = statistics.median(samples[1:])
    rate = block.nbytes / seconds
    return [
        {
            "rank": rank,
            "MiB": round(block.nbytes / 2**20, 1),
            "pages": block.num_pages,
            "pieces": len(block.pieces),
            "ms": round(seconds * 1e3, 3),
            "GB/s": round(rate / 1e9, 2),
            "% of the link": round(100 * rate / ceilings(bench.scale, report)["link"], 1),
        }
    ]


def meanwhile(bench: Workbench, report: Report, rows: int) -> list[Row]:
    """Measure times between tokens as in the loop, a step dispatched ahead, while adapters of the middle rank load.

    Two adapters load at once, all the time.
    """
    scale = bench.scale
    batch = bench.decode(rows, scale.contexts[0], Mix("mixed ranks, q k v o", scale.ranks, ATTENTION_TARGETS))
    rank = scale.load_ranks[len(scale.load_ranks) // 2]
    store = Store(bench)
    size = store.block(rank).num_pages
    taken = {page for s in batch.chunks for page in (*s.pages, *(s.adapter.pages if s.adapter else ()))}
    free = [page for page in range(1, bench.engine.num_pages) if page not in taken]
    if len(free) < 2 * size:
        raise Skip(f"two adapters of rank {rank} do not fit beside the batch")
    places = itertools.cycle([free[:size], free[size : 2 * size]])
    names = (f"{i}/{rank}" for i in itertools.count())
    loads = loads_of(bench, store)

    loaded = 0

    def load() -> None:
        nonlocal loaded
        loaded += sum(result.num_bytes for result in loads.poll())
        while len(loads) < 2:
            loads.begin(next(names), next(places))

    engine = bench.engine

    def step() -> Any:
        """Dispatch in serving's order: pieces go behind the step's inputs and ahead of its programs."""
        sent = engine.send(batch.chunks, batch.sampling_rows)
        loads.send_beside_step()
        return engine.sample(engine.forward(sent)).done

    result = []
    for name, between in ((IDLE, lambda: None), (f"loading rank {rank}, all seven", load)):
        before, begin = loaded, time.perf_counter()
        gaps = token_gaps(step, between, STEPS, SECONDS)
        seconds = time.perf_counter() - begin
        rate = (loaded - before) / seconds
        result.append(
            {
                "rows": rows,
                "meanwhile": name,
                "steps": len(gaps),
                "P50 ms": round(float(np.percentile(gaps, 50)) * 1e3, 3),
                "P99 ms": round(float(np.percentile(gaps, 99)) * 1e3, 3),
                "most ms": round(max(gaps) * 1e3, 3),
                "predicted GB/s": (predictions.loaded_gb_per_s(device_kind(), rows) or "") if name != IDLE else "",
                "loaded GB/s": round(rate / 1e9, 2),
                "% of the link": round(100 * rate / ceilings(scale, report)["link"], 1),
            }
        )
    while len(loads):
        loads.poll(wait=True)
    bench.engine.block_until_ready()
    return result


def token_gaps(step: Callable[[], Any], between: Callable[[], None], steps: int, seconds: float) -> list[float]:
    """Seconds from one step's tokens to the next one's, without the first steps."""
    gaps: list[float] = []
    ahead = step()
    begin = last = time.perf_counter()
    for i in range(steps + 5):
        between()
        tokens, ahead = ahead, step()
        np.asarray(tokens)
        now = time.perf_counter()
        if i >= 5:
            gaps.append(now - last)
        last = now
        if now - begin > seconds and len(gaps) >= 5:
            break
    np.asarray(ahead)
    return gaps
