"""Figures of `bench serve`, under the names that `vllm bench serve` gives them."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chameleon_jax.checks import require
from chameleon_jax.serving.cli.bench_load import Answer

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


def parse_metrics(text: str) -> list[str]:
    """Parse `--percentile-metrics`. Raises ValueError."""
    names = [name.strip() for name in text.split(",")]
    require(set(names) <= METRICS.keys(), "percentile_metrics", text, f"{', '.join(METRICS)}, comma-separated")
    return names


def parse_percentiles(text: str) -> list[float]:
    """Parse `--metric-percentiles`. Raises ValueError."""
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        values = [-1.0]
    require(all(0 <= value <= 100 for value in values), "metric_percentiles", text, "numbers from 0 to 100, comma-separated")
    return values


def summarise(
    answers: Sequence[Answer], models: Sequence[str], seconds: float, metrics: Sequence[str], percentiles: Sequence[float]
) -> dict[str, Any]:
    """Summarise a run.

    Args:
        answers: Answers, failed ones among them.
        models: Model that each request named.
        seconds: Duration of the run.
        metrics: Names in METRICS.
        percentiles: Percentiles to report of each, 0 to 100.
    """
    done = [answer for answer in answers if answer.error is None]
    prompt_tokens, output_tokens = (sum(getattr(a, f) for a in done) for f in ("prompt_tokens", "output_tokens"))
    summary: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(answers) - len(done),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(done) / seconds,
        "output_throughput": output_tokens / seconds,
        "total_token_throughput": (prompt_tokens + output_tokens) / seconds,
        "requests_by_model": dict(collections.Counter(models).most_common()),
    }
    for name in metrics:
        values = 1e3 * np.array(_values(name, done))
        if len(values):
            figures = {"mean": values.mean(), "median": np.median(values), "std": values.std()}
            figures |= {f"p{q:g}": np.percentile(values, q) for q in percentiles}
            summary |= {f"{key}_{name}_ms": float(value) for key, value in figures.items()}
    return summary


def details(answers: Sequence[Answer], models: Sequence[str]) -> dict[str, list[Any]]:
    """List the figures of every request, in order of arrival; a failed one has a `ttft` of null, as vLLM's has 0."""
    return {
        "models": list(models),
        "input_lens": [answer.prompt_tokens for answer in answers],
        "output_lens": [answer.output_tokens for answer in answers],
        "ttfts": [None if answer.first is None else answer.first - answer.started for answer in answers],
        "itls": [answer.itl for answer in answers],
        "generated_texts": [answer.text for answer in answers],
        "errors": [answer.error or "" for answer in answers],
    }


def format_table(summary: Mapping[str, Any], metrics: Sequence[str], width: int = 56) -> str:
    """Format a summary for a terminal."""
    lines = [" Serving Benchmark Result ".center(width, "=")]

    def add(label: str, value: float) -> None:
        text = f"{value:.2f}" if isinstance(value, float) else str(value)
        lines.append(f"{label:<{width - 12}}{text:>12}")

    add("Successful requests:", summary["completed"])
    add("Failed requests:", summary["failed"])
    add("Benchmark duration (s):", summary["duration"])
    add("Total input tokens:", summary["total_input_tokens"])
    add("Total generated tokens:", summary["total_output_tokens"])
    add("Request throughput (req/s):", summary["request_throughput"])
    add("Output token throughput (tok/s):", summary["output_throughput"])
    add("Total token throughput (tok/s):", summary["total_token_throughput"])
    for name in metrics:
        lines.append(f" {METRICS[name]} ".center(width, "-"))
        for key, value in summary.items():
            if key.endswith(f"_{name}_ms") and not key.startswith("std"):
                add(f"{key.split('_')[0].capitalize()} {name.upper()} (ms):", value)
    return "\n".join([*lines, "=" * width])


def _values(name: str, answers: Sequence[Answer]) -> list[float]:
    """Seconds of one metric: one value a request, or for the inter-token latency one a gap."""
    if name == "itl":
        return [gap for answer in answers for gap in answer.itl]
    values = []
    for answer in answers:
        assert answer.first is not None
        ttft, latency = answer.first - answer.started, answer.last - answer.started
        if name == "tpot":
            values += [(latency - ttft) / (answer.output_tokens - 1)] if answer.output_tokens > 1 else []
        else:
            values.append(ttft if name == "ttft" else latency)
    return values
