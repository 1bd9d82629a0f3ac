"""Metrics by adapter: requests, tokens, time to first token, time in the queue."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import prometheus_client
from prometheus_client.core import Metric

from chameleon_jax.errors import EngineDead
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import LoRAMix, LoRARequest
from chameleon_jax.serving.observers import Observer

LABEL = "adapter_name"
BASE = ""
"""Label of requests for the base model. No adapter has the empty name."""
OTHER = "other"
"""Label of the adapters that have none of their own."""

BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
"""Fewer than those of all requests together, as a scrape writes them for every adapter."""


class AdapterMetrics(Observer):
    """Observer that counts by the adapter's name.

    An adapter gets series of its own with its first request, while fewer than `max_adapters` have some. Later ones are counted
    as OTHER. So are mixes, whose weights a client may change with every request. `forget` ends the series of names that were
    removed, and the next new names take their places.

    Args:
        max_adapters: Most adapters with series of their own.
    """

    def __init__(self, max_adapters: int):
        self._max_adapters = max_adapters
        self._names: set[str] = set()
        self._lock = threading.Lock()  # the engine's thread counts while a scrape forgets
        text = "Requests that ended, by adapter and finish reason."
        self._finished = prometheus_client.Counter(
            "chameleon:lora_request_success", text, (LABEL, "finished_reason"), registry=None
        )
        self._prompts = _counter("lora_prompt_tokens", "Prompt tokens of requests that ended, by adapter.")
        self._outputs = _counter("lora_generation_tokens", "Tokens generated for requests that ended, by adapter.")
        self._ttft = _histogram("lora_time_to_first_token_seconds", "Time from arrival to the first token, by adapter.")
        self._queued = _histogram("lora_request_queue_time_seconds", "Time from arrival to the start, by adapter.")
        self._families = (self._finished, self._prompts, self._outputs, self._ttft, self._queued)
        self._begin(BASE)

    def first_token(self, request: Request) -> None:
        times = request.metrics
        assert times.first_token_time is not None
        with self._lock:
            label = self._label(request.adapter_name, request.is_mix)
            self._ttft.labels(label).observe(times.first_token_time - times.arrival_time)
            self._observe_queue(label, request)

    def finished(self, request: Request) -> None:
        assert request.finish_reason is not None
        with self._lock:
            label = self._label(request.adapter_name, request.is_mix)
            self._finished.labels(label, request.finish_reason.value).inc()
            self._prompts.labels(label).inc(len(request.prompt_token_ids))
            self._outputs.labels(label).inc(len(request.output_token_ids))
            if request.metrics.first_token_time is None:
                self._observe_queue(label, request)

    def engine_died(self, error: EngineDead, loras: Sequence[LoRARequest | None]) -> None:
        with self._lock:
            for lora in loras:
                label = BASE if lora is None else self._label(lora.name, isinstance(lora, LoRAMix))
                self._finished.labels(label, FinishReason.ERROR.value).inc()

    def forget(self, is_registered: Callable[[str], bool]) -> None:
        """End the series of adapters that are not registered any more."""
        with self._lock:
            for name in [name for name in self._names if not is_registered(name)]:
                self._names.remove(name)
                for reason in FinishReason:
                    self._finished.remove(name, reason.value)
                for family in self._families[1:]:
                    family.remove(name)

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            yield from family.collect()

    def _label(self, name: str | None, is_mix: bool) -> str:
        if name is None:
            return BASE
        if is_mix:
            return OTHER
        if name in self._names:
            return name
        if len(self._names) < self._max_adapters and name != OTHER:
            self._names.add(name)
            self._begin(name)
            return name
        return OTHER

    def _begin(self, label: str) -> None:
        """Begin the series of a label at 0, so that a rate sees its first request."""
        for reason in FinishReason:
            self._finished.labels(label, reason.value)
        for family in self._families[1:]:
            family.labels(label)

    def _observe_queue(self, label: str, request: Request) -> None:
        times = request.metrics
        if times.first_scheduled_time is not None:
            self._queued.labels(label).observe(times.first_scheduled_time - times.arrival_time)


def _counter(name: str, text: str) -> prometheus_client.Counter:
    return prometheus_client.Counter(f"chameleon:{name}", text, (LABEL,), registry=None)


def _histogram(name: str, text: str) -> prometheus_client.Histogram:
    return prometheus_client.Histogram(f"chameleon:{name}", text, (LABEL,), buckets=BUCKETS_S, registry=None)
