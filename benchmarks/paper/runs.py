"""Simulations by value: a Run determines a simulation, whose summary is computed once and kept."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper.summary import Summary, summarize
from benchmarks.simulator.cost_model import PROFILES
from benchmarks.simulator.simulate import simulate
from benchmarks.workload import WorkloadSpec, generate
from chameleon_jax.systems import System, get_system

ROOT = Path(__file__).parents[2]
SOURCES = (
    "chameleon_jax/*.py",
    "chameleon_jax/memory/*.py",
    "chameleon_jax/scheduler/*.py",
    "chameleon_jax/models/config.py",
    "chameleon_jax/models/page_layout.py",
    "benchmarks/simulator/simulate.py",
    "benchmarks/simulator/cost_model.py",
    "benchmarks/outcome.py",
    "benchmarks/workload.py",
    "benchmarks/paper/summary.py",
)
"""Files that determine a summary beside the Run."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One simulation.

    Attributes:
        profile: Model and device, a name in PROFILES.
        predictor: See `simulate.make_predictor`.
        batch_tokens: Prompt tokens of a step, or of a batch in S-LoRA's loop. None takes the simulator's.
        timeline: Whether the summary has lines over time.
    """

    system: str | System
    spec: WorkloadSpec
    profile: str = "a40-llama-7b"
    predictor: str = "proxy-0.8"
    timeline: bool = False
    batch_tokens: int | None = None

    def at(self, **changes: Any) -> Run:
        """Run with other fields of the workload."""
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, **changes))

    def describe(self) -> dict[str, Any]:
        """Fields that differ from the defaults, for JSON."""
        spec = {f.name: getattr(self.spec, f.name) for f in dataclasses.fields(self.spec)}
        usual = {f.name: f.default for f in dataclasses.fields(self.spec)}
        spec = {name: str(v) if isinstance(v, Path) else v for name, v in spec.items() if v != usual[name] and name != "seed"}
        system = self.system if isinstance(self.system, str) else dataclasses.asdict(self.system)
        batch = {} if self.batch_tokens is None else {"batch_tokens": self.batch_tokens}
        return {"system": system, "profile": self.profile, "predictor": self.predictor} | batch | spec

    def key(self) -> str:
        """Hash of the content, the same for all names of one system or profile."""
        content = dataclasses.asdict(self) | {
            "system": dataclasses.asdict(get_system(self.system)),
            "profile": dataclasses.asdict(PROFILES[self.profile]) | {"name": ""},
        }
        if self.spec.trace is not None:
            content["spec"]["trace"] = _digest(self.spec.trace)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


@functools.cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fingerprint(root: Path = ROOT, sources: Iterable[str] = SOURCES) -> str:
    """Hash of the sources that determine results."""
    content = hashlib.sha256(np.__version__.encode())
    for path in sorted(path for pattern in sources for path in root.glob(pattern)):
        content.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()[:16]


def execute(run: Run) -> Summary:
    result = simulate(
        generate(run.spec),
        PROFILES[run.profile],
        run.system,
        predictor=run.predictor,
        length_factor=run.spec.length_factor,
        seed=run.spec.seed,
        max_num_batched_tokens=run.batch_tokens,
    )
    return summarize(result, run.timeline)


class Cache:
    """Summaries by Run, on disk: a line of JSON each, appended as soon as it is known.

    Every fingerprint has a file of its own, so summaries by other sources are never read.
    """

    def __init__(self, folder: Path, sources: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"runs-{sources}.jsonl"
        self._summaries: dict[str, Summary] = {}
        if self.path.exists():
            text = self.path.read_text()
            for line in text.splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last line of an interrupted reproduction
                    entry = json.loads(line)
                    self._summaries[entry["key"]] = entry["summary"]
            if text and not text.endswith("\n"):
                with self.path.open("a") as file:
                    file.write("\n")

    def __len__(self) -> int:
        return len(self._summaries)

    def get(self, run: Run) -> Summary | None:
        return self._summaries.get(run.key())

    def put(self, run: Run, summary: Summary) -> None:
        key = run.key()
        self._summaries[key] = summary
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, "summary": summary}) + "\n")


class Runner:
    """Runner of the simulations that the cache lacks, in `workers` processes, or in this process if `workers` is 1."""

    def __init__(self, cache: Cache, workers: int):
        self.cache = cache
        self.executed = 0
        context = multiprocessing.get_context("spawn")  # a fork of a process in which JAX has threads may hang
        self._pool = ProcessPoolExecutor(workers, context, _ignore_interrupts) if workers > 1 else None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, runs: Iterable[Run]) -> None:
        """Run all that the cache lacks; the cache then has every summary."""
        missing = list({run.key(): run for run in runs if self.cache.get(run) is None}.values())
        missing.sort(key=lambda run: run.spec.rps * run.spec.duration_s, reverse=True)  # the last to end should be short
        for run, summary in self._summaries(missing):
            self.cache.put(run, summary)
            self.executed += 1

    def _summaries(self, runs: list[Run]) -> Iterator[tuple[Run, Summary]]:
        if self._pool is None:
            yield from ((run, execute(run)) for run in runs)
            return
        futures = {self._pool.submit(execute, run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
