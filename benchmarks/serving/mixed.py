"""Throughput of the engine while prompts arrive among rows that decode, here and in another checkout of the project, by turns.

As one request ends the next arrives, so that a prompt is computed while all other rows decode. Each checkout has a process of
its own, which lives through all rounds; one computes while the other waits for its turn. Rounds have the same requests in both,
and which one goes first changes with each round.

A round is measured from the first request's end to the last one's arrival: before, the first prompts arrive together, and
after, fewer and fewer rows decode. Rounds in which programs were compiled do not count.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.demo import ADAPTERS
from benchmarks.machine import Out, Row, describe, publish

THIS = Path(__file__).parents[2]
"""Root of this checkout."""
WORKER = Path(__file__).with_name("mixed_worker.py")
COMPARED = ("output tokens/s", "all tokens/s", "TBT P50, ms", "TBT P99, ms", "TTFT P50, ms", "TTFT P99, ms")
"""Columns whose ratios are printed."""
Requests = list[dict[str, Any]]


class Worker:
    """Process with an engine of one checkout.

    Args:
        root: Root of the checkout.
        start: Model, settings and adapters.

    Attributes:
        vocab_size: Token ids of the model.

    Raises:
        RuntimeError: The engine does not start, or is not of that checkout.
    """

    def __init__(self, root: Path, start: dict[str, Any]):
        self.root = root
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        ready = self.ask(start)
        self.vocab_size: int = ready["vocab_size"]
        if not Path(ready["package"]).resolve().is_relative_to(root):
            self.close()
            raise RuntimeError(f"the worker of {root} runs {ready['package']}")

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send a line and wait for the answer. Raises RuntimeError where the process ends without one."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self.close()
            raise RuntimeError(f"the worker of {self.root} ended with exit code {self._process.returncode}")
        return json.loads(answer)

    def close(self) -> None:
        """Let the process end at the end of its input."""
        self._process.communicate()


def commit(root: Path) -> str:
    """Name the commit of a checkout, with a mark where its files differ; unknown where it is none of git's."""
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    told = subprocess.run(git, capture_output=True, text=True)
    return told.stdout.strip() if told.returncode == 0 else "unknown"


def draw(
    count: int, names: list[str], base_share: float, prompt_len: tuple[int, int], output_len: tuple[int, int], seed: int
) -> Requests:
    """Draw requests without their prompts' tokens. Adapters take turns."""
    rng = np.random.default_rng(seed)
    turns = itertools.cycle(names)
    return [
        {
            "prompt_len": int(rng.integers(*prompt_len, endpoint=True)),
            "max_tokens": int(rng.integers(*output_len, endpoint=True)),
            "adapter": None if rng.random() < base_share else next(turns),
        }
        for _ in range(count)
    ]


def fill(requests: Requests, vocab: int, seed: int) -> Requests:
    """Give requests random prompts, new in each round: an engine may keep computed ones."""
    rng = np.random.default_rng(seed)
    return [
        {"prompt": rng.integers(0, vocab, r["prompt_len"]).tolist(), "max_tokens": r["max_tokens"], "adapter": r["adapter"]}
        for r in requests
    ]


def figures(outcome: dict[str, Any], requests: Requests, concurrency: int) -> Row:
    """Figures of a round. Its first requests, which arrive together, have no part in the times to first token."""
    arrivals, times = outcome["arrivals"], outcome["times"]
    begin, end = min(t[-1] for t in times), arrivals[-1]
    generated = sum(begin < t <= end for request in times for t in request)
    prompts = sum(r["prompt_len"] for r, t in zip(requests, times) if begin < t[0] <= end)
    gaps = [b - a for request in times for a, b in itertools.pairwise(request) if begin < b <= end]
    waits = [t[0] - a for a, t in zip(arrivals[concurrency:], times[concurrency:])]
    tbt, ttft = (1e3 * np.percentile(seconds, [50, 99]) for seconds in (gaps, waits))
    steps = [(prompt_tokens, rows) for at, prompt_tokens, rows in outcome["steps"] if begin < at <= end]
    return {
        "output tokens/s": round(generated / (end - begin), 1),
        "all tokens/s": round((generated + prompts) / (end - begin), 1),
        "TBT P50, ms": round(float(tbt[0]), 1),
        "TBT P99, ms": round(float(tbt[1]), 1),
        "TTFT P50, ms": round(float(ttft[0]), 1),
        "TTFT P99, ms": round(float(ttft[1]), 1),
        "measured, s": round(end - begin, 2),
        "steps": len(steps),
        "with prompts and decodes": sum(prompt_tokens > 0 and rows > 0 for prompt_tokens, rows in steps),
        "rows decoded a step": round(float(np.mean([rows for _, rows in steps])), 1),
        "compiled": outcome["compiled"],
    }


def medians(rows: list[Row]) -> list[Row]:
    """Medians of each checkout's rounds without compilations. Raises RuntimeError where it has none."""
    found = []
    for name in dict.fromkeys(row["checkout"] for row in rows):
        counted = [row for row in rows if row["checkout"] == name and not row["compiled"]]
        if not counted:
            raise RuntimeError(f"programs were compiled in every round of {name}: let more rounds be unmeasured")
        values = {column: round(float(np.median([row[column] for row in counted])), 1) for column in COMPARED}
        found.append({"medians of": name, "rounds": len(counted)} | values)
    return found


def ratios(rows: list[Row], found: list[Row]) -> list[Row]:
    """Ratios of this checkout to the other: of medians, and of each round in which neither compiled a program."""
    this, other = found
    mine, its = (
        {row["round"]: row for row in rows if row["checkout"] == f["medians of"] and not row["compiled"]} for f in found
    )
    table = []
    for column in COMPARED:
        of_rounds = " ".join(f"{mine[i][column] / its[i][column]:.3f}" for i in sorted(mine.keys() & its.keys()))
        table.append({"this / other": column, "of medians": f"{this[column] / other[column]:.3f}", "of rounds": of_rounds})
    return table


def same_tokens(this: list[list[int]], other: list[list[int]]) -> float:
    """Share of output tokens that two outcomes of the same requests have in common, percent."""
    return round(100 * float(np.mean([a == b for x, y in zip(this, other, strict=True) for a, b in zip(x, y, strict=True)])), 1)


def measure(workers: dict[str, Worker], requests: Requests, concurrency: int, rounds: int, warm_ups: int) -> dict[str, Any]:
    """Let the workers serve the rounds by turns, the first `warm_ups` unmeasured."""
    rows: list[Row] = []
    same: list[float] = []
    for number in range(-warm_ups, rounds):
        outputs: dict[str, list[list[int]]] = {}
        for name in list(workers)[:: 1 if number % 2 == 0 else -1]:
            filled = fill(requests, workers[name].vocab_size, number + warm_ups)
            outcome = workers[name].ask({"requests": filled, "concurrency": concurrency})
            outputs[name] = outcome["outputs"]
            row = {"round": number, "checkout": name} | figures(outcome, requests, concurrency)
            print(row, file=sys.stderr, flush=True)
            if number >= 0:
                rows.append(row)
        if number >= 0 and len(workers) == 2:
            same.append(same_tokens(*outputs.values()))
    found = medians(rows)
    if len(workers) < 2:
        return {"table": rows + found}
    return {"same_tokens_percent": same, "table": rows + found + ratios(rows, found)}


def main(
    against: Annotated[
        Path | None, typer.Option(help="Root of another checkout to compare with (default: this one is measured alone).")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of each checkout.")] = 5,
    warm_ups: Annotated[int, typer.Option(min=0, help="Rounds of each checkout before the measured ones.")] = 1,
    requests: Annotated[int, typer.Option(help="Requests in a round; at least twice those that run at once.")] = 96,
    concurrency: Annotated[int, typer.Option(min=2, help="Requests that run at once.")] = 16,
    prompt_len: Annotated[tuple[int, int], typer.Option(help="Fewest and most tokens of a prompt.")] = (20, 150),
    output_len: Annotated[tuple[int, int], typer.Option(help="Fewest and most tokens of an output.")] = (16, 64),
    base_share: Annotated[float, typer.Option(min=0, max=1, help="Share of requests without an adapter.")] = 0.2,
    model: Annotated[str, typer.Option(help="Preset, GGUF file, Hugging Face or Orbax directory, or hub id.")] = "smollm2-135m",
    adapter_dir: Annotated[Path, typer.Option(help="Directory whose subdirectories are adapters.")] = ADAPTERS,
    max_lora_rank: Annotated[int, typer.Option(help="Largest rank of an adapter.")] = 16,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Prompt tokens a step at most.")] = 256,
    system: Annotated[str, typer.Option(help="Policies that serve.")] = "chameleon-plus",
    compile_programs: Annotated[
        str, typer.Option(help="ahead compiles all programs before the first round; lazy those that a round needs, in it.")
    ] = "ahead",
    seed: Annotated[int, typer.Option(help="Seed of lengths, order of adapters and prompts.")] = 0,
    out: Out = None,
) -> None:
    """Measure throughput while prompts arrive among decoding rows, also beside another checkout."""
    if requests < 2 * concurrency:
        raise typer.BadParameter(f"--requests is {requests}; allowed: {2 * concurrency} or more, twice --concurrency")
    if compile_programs not in ("ahead", "lazy"):
        raise typer.BadParameter(f"--compile-programs is {compile_programs!r}; allowed: ahead, lazy")
    checkouts = {"this": THIS}
    if against is not None:
        if not (against / "chameleon_jax" / "__init__.py").is_file():
            raise typer.BadParameter(f"--against is {against}; allowed: root of a checkout of this project")
        checkouts["other"] = against.resolve()
    adapters = {folder.name: str(folder.resolve()) for folder in sorted(adapter_dir.iterdir()) if folder.is_dir()}
    settings = {
        "max_num_seqs": concurrency,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": -(-(prompt_len[1] + output_len[1]) // 128) * 128,  # so that other lengths have the same programs
        "max_lora_rank": max_lora_rank,
        "system": system,
        "compile_programs": compile_programs,
        "gpu_memory_utilization": round(0.9 / len(checkouts), 2),
    }
    drawn = draw(requests, list(adapters), base_share, prompt_len, output_len, seed)
    workers: dict[str, Worker] = {}
    try:
        for name, root in checkouts.items():
            workers[name] = Worker(root, {"model": model, "settings": settings, "adapters": adapters})
        result = measure(workers, drawn, concurrency, rounds, warm_ups)
    finally:
        for worker in workers.values():
            worker.close()
    about = {"commits": {name: commit(root) for name, root in checkouts.items()}, "model": model, "settings": settings}
    publish(describe() | about | result, out)
