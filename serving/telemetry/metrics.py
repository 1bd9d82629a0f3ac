"""Metrics for Prometheus. Latencies are observed when they are known; the rest is read from the engine at a scrape."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import prometheus_client
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from chameleon_jax.errors import EngineDead
from chameleon_jax.executor import LoadResult
from chameleon_jax.output_processor import OutputSnapshot
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import LoRARequest
from chameleon_jax.serving.observers import Observer
from chameleon_jax.serving.stats import EngineStats
from chameleon_jax.serving.telemetry import engine_metrics
from chameleon_jax.serving.telemetry.adapter_metrics import AdapterMetrics
from chameleon_jax.serving.telemetry.compilations import Compilations
from chameleon_jax.serving.telemetry.histogram import BatchHistogram
from chameleon_jax.serving.telemetry.vllm_names import with_vllm_names

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of `render`'s return. Every parser in use reads this version."""

REQUEST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
TOKEN_S = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
LOAD_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LENGTHS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))

CUT_SHORT = (FinishReason.ABORT, FinishReason.ERROR)


class Metrics(Observer):
    """Observer of an engine. It is made before the engine, so that it counts the programs compiled for it.

    Times to the first token, of the prefill and in the queue are observed with the first token, as a generation may take
    minutes more. Lengths and the other latencies are observed for requests that ended by themselves.

    Args:
        max_adapters: Most adapters with series of their own.
        vllm_names: Whether metrics that vLLM has too are also written under its names.
        clock: Seconds, monotonic.

    Attributes:
        by_adapter: Metrics by adapter.
    """

    def __init__(self, max_adapters: int = 100, vllm_names: bool = True, clock: Callable[[], float] = time.monotonic):
        self.compilations = Compilations()
        self.by_adapter = AdapterMetrics(max_adapters)
        self._vllm_names = vllm_names
        self._clock = clock
        self._token_at: dict[Request, float] = {}  # time of each unfinished request's last token
        self._ttft = _histogram("time_to_first_token_seconds", "Time from arrival to the first token.", REQUEST_S)
        self._tpot = _histogram("time_per_output_token_seconds", "Mean time between the tokens of a request.", TOKEN_S)
        text = "Time between one token of a request and its next."
        self._gaps = BatchHistogram("chameleon:inter_token_latency_seconds", text, TOKEN_S)
        self._e2e = _histogram("e2e_request_latency_seconds", "Time from arrival to the last token.", REQUEST_S)
        text = "Time from arrival to the start, by queue of the scheduler."
        self._queued = _histogram("request_queue_time_seconds", text, REQUEST_S, ("queue",))
        self._prefill = _histogram("request_prefill_time_seconds", "Time from the start to the first token.", REQUEST_S)
        self._decode = _histogram("request_decode_time_seconds", "Time from the first token to the last.", REQUEST_S)
        self._inference = _histogram("request_inference_time_seconds", "Time from the start to the last token.", REQUEST_S)
        self._prompts = _histogram("request_prompt_tokens", "Prompt tokens of a request.", LENGTHS)
        self._outputs = _histogram("request_generation_tokens", "Tokens generated for a request.", LENGTHS)
        self._loads = _histogram("lora_adapter_load_seconds", "Time from an adapter load's begin to its end.", LOAD_S)
        self._finished = _counter("request_success", "Requests that ended, by finish reason.", ("finished_reason",))
        for reason in FinishReason:
            self._finished.labels(reason.value)
        self._failed_loads = _counter("lora_load_failures", "Adapter loads that failed.")
        latencies = (self._ttft, self._tpot, self._gaps, self._e2e, self._queued, self._prefill, self._decode, self._inference)
        self._observed = (*latencies, self._prompts, self._outputs, self._loads, self._finished, self._failed_loads)
        self._process = prometheus_client.ProcessCollector(registry=None)

    def close(self) -> None:
        self.compilations.close()

    # -- on the engine's thread -----------------------------------------------------------------------------------------

    def updated(self, snapshots: Sequence[OutputSnapshot]) -> None:
        now, gaps = self._clock(), Counter[float]()
        for snapshot in snapshots:
            request = snapshot.request
            if request.finish_reason in CUT_SHORT:  # it has no new token
                continue
            if (last := self._token_at.get(request)) is not None:
                gaps[now - last] += 1
            self._token_at[request] = now
        for gap, times in gaps.items():
            self._gaps.observe(gap, times)

    def first_token(self, request: Request) -> None:
        times = request.metrics
        assert times.first_token_time is not None and times.first_scheduled_time is not None
        self.by_adapter.first_token(request)
        self._ttft.observe(times.first_token_time - times.arrival_time)
        self._prefill.observe(times.first_token_time - times.first_scheduled_time)
        self._observe_queue(request)

    def finished(self, request: Request) -> None:
        times, reason = request.metrics, request.finish_reason
        assert reason is not None and times.finished_time is not None
        self.by_adapter.finished(request)
        self._token_at.pop(request, None)
        self._finished.labels(reason.value).inc()
        if times.first_token_time is None:
            self._observe_queue(request)
        elif reason not in CUT_SHORT:
            assert times.first_scheduled_time is not None
            num_tokens = len(request.output_token_ids)
            decode = times.finished_time - times.first_token_time
            self._e2e.observe(times.finished_time - times.arrival_time)
            self._inference.observe(times.finished_time - times.first_scheduled_time)
            self._decode.observe(decode)
            self._prompts.observe(len(request.prompt_token_ids))
            self._outputs.observe(num_tokens)
            if num_tokens > 1:
                self._tpot.observe(decode / (num_tokens - 1))

    def engine_died(self, error: EngineDead, loras: Sequence[LoRARequest | None]) -> None:
        self.by_adapter.engine_died(error, loras)
        self._token_at.clear()
        self._finished.labels(FinishReason.ERROR.value).inc(len(loras))

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

    def render(
        self,
        stats: EngineStats | None,
        up: bool = True,
        model_name: str = "",
        is_adapter: Callable[[str], bool] = lambda name: True,
    ) -> bytes:
        """Render every metric in Prometheus' text format.

        Args:
            stats: State of the engine; None where it died before its first snapshot.
            up: Whether the engine lives.
            model_name: Name of the base model, a label of the metrics under vLLM's names.
            is_adapter: Whether an adapter of that name is registered. The series of others end.
        """
        self.by_adapter.forget(is_adapter)
        families: Iterable[Metric] = self._families(stats, up)
        if self._vllm_names:
            families = with_vllm_names(families, model_name)
        return prometheus_client.generate_latest(_Scrape(families))

    def _families(self, stats: EngineStats | None, up: bool) -> Iterator[Metric]:
        yield engine_metrics.gauge("engine_up", "1 while the engine lives, 0 once it is dead and must be restarted.", up)
        if stats is not None:
            yield from engine_metrics.families(stats)
        made = self.compilations
        compiled = {"start": made.at_start, "background": made.in_background, "serving": made.while_serving}
        text = "Programs compiled or read from the cache: at the start, in the background, and while requests wait."
        yield engine_metrics.counter("compilations", text, compiled, "phase")
        for metric in (*self._observed, self.by_adapter):
            for family in metric.collect():
                family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
                yield family
        yield from self._process.collect()


class _Scrape(Collector):
    def __init__(self, families: Iterable[Metric]):
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _histogram(name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> prometheus_client.Histogram:
    return prometheus_client.Histogram(f"chameleon:{name}", text, labels, buckets=buckets, registry=None)


def _counter(name: str, text: str, labels: tuple[str, ...] = ()) -> prometheus_client.Counter:
    return prometheus_client.Counter(f"chameleon:{name}", text, labels, registry=None)
