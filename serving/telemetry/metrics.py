"""Metrics for Prometheus: latencies are observed as they become known, everything else is read from the engine at a scrape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import prometheus_client
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from chameleon_jax.errors import EngineDead
from chameleon_jax.executor import LoadResult
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import Request
from chameleon_jax.serving.observers import Observer
from chameleon_jax.serving.stats import EngineStats
from chameleon_jax.serving.telemetry import engine_metrics
from chameleon_jax.serving.telemetry.compilations import Compilations

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of what `render` returns. Every parser in use reads this version."""

REQUEST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
TOKEN_S = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
LOAD_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics(Observer):
    """An observer of the engine. Made before the engine, so that it counts what is compiled for it.

    Times to the first token and in the queue are observed when a first token is there, as a generation may take minutes more;
    the other latencies are those of requests that ended by themselves.
    """

    def __init__(self) -> None:
        self.compilations = Compilations()
        self._ttft = _histogram("time_to_first_token_seconds", "From arrival to the first token.", REQUEST_S)
        self._tpot = _histogram("time_per_output_token_seconds", "Of each request, the mean time between its tokens.", TOKEN_S)
        self._e2e = _histogram("e2e_request_latency_seconds", "From arrival to the last token.", REQUEST_S)
        text = "From arrival to the start, by queue of the scheduler."
        self._queued = _histogram("request_queue_time_seconds", text, REQUEST_S, ("queue",))
        self._loads = _histogram("lora_adapter_load_seconds", "From a load's begin until the adapter could be used.", LOAD_S)
        self._finished = _counter("request_success", "Requests that ended, by how.", ("finished_reason",))
        for reason in FinishReason:
            self._finished.labels(reason.value)
        self._failed_loads = _counter("lora_load_failures", "Loads of adapters that failed.")

    def close(self) -> None:
        self.compilations.close()

    # -- on the engine's thread -----------------------------------------------------------------------------------------

    def first_token(self, request: Request) -> None:
        times = request.metrics
        assert times.first_token_time is not None
        self._ttft.observe(times.first_token_time - times.arrival_time)
        self._observe_queue(request)

    def finished(self, request: Request) -> None:
        times, reason = request.metrics, request.finish_reason
        assert reason is not None and times.finished_time is not None
        self._finished.labels(reason.value).inc()
        if times.first_token_time is None:
            self._observe_queue(request)
        elif reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._e2e.observe(times.finished_time - times.arrival_time)
            gaps = len(request.output_token_ids) - 1
            if gaps > 0:
                self._tpot.observe((times.finished_time - times.first_token_time) / gaps)

    def engine_died(self, error: EngineDead, num_requests: int) -> None:
        self._finished.labels(FinishReason.ERROR.value).inc(num_requests)

    def loaded(self, result: LoadResult) -> None:
        if result.error is None:
            self._loads.observe(result.seconds)
        else:
            self._failed_loads.inc()

    def _observe_queue(self, request: Request) -> None:
        times = request.metrics
        if times.first_scheduled_time is not None:
            self._queued.labels(str(request.queue)).observe(times.first_scheduled_time - times.arrival_time)

    # -- at a scrape ----------------------------------------------------------------------------------------------------

    def render(self, stats: EngineStats | None, up: bool = True) -> bytes:
        """In Prometheus' text format.

        Args:
            stats: None: the engine died before it said anything.
            up: whether the engine lives.
        """
        return prometheus_client.generate_latest(_Scrape(self._families(stats, up)))

    def _families(self, stats: EngineStats | None, up: bool) -> Iterator[Metric]:
        yield engine_metrics.gauge("engine_up", "1 while the engine lives, 0 once it is dead: only a restart helps.", up)
        if stats is not None:
            yield from engine_metrics.families(stats)
        compiled = {"start": self.compilations.at_start, "serving": self.compilations.while_serving}
        text = "Programs compiled, or read from the cache: before the first request, and while requests waited."
        yield engine_metrics.counter("compilations", text, compiled, "phase")
        for metric in (self._ttft, self._tpot, self._e2e, self._queued, self._loads, self._finished, self._failed_loads):
            for family in metric.collect():
                family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
                yield family


class _Scrape(Collector):
    def __init__(self, families: Iterable[Metric]):
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _histogram(name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> prometheus_client.Histogram:
    return prometheus_client.Histogram(f"chameleon:{name}", text, labels, buckets=buckets, registry=None)


def _counter(name: str, text: str, labels: tuple[str, ...] = ()) -> prometheus_client.Counter:
    return prometheus_client.Counter(f"chameleon:{name}", text, labels, registry=None)
