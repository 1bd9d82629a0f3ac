"""OpenTelemetry traces: the spans of each request, made from its times once it has ended. Needs the extra `otel`."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from chameleon_jax.checks import require
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import Request
from chameleon_jax.serving.observers import Observer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.util.types import AttributeValue

logger = logging.getLogger(__name__)

MAX_QUEUED = 4096
"""Ended requests that may wait for their spans. Further ones get none."""


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Make an exporter to a collector over gRPC.

    Raises:
        ValueError: The endpoint is no URL, or the extra `otel` is not installed.
    """
    require(endpoint.startswith(("http://", "https://")), "otlp_endpoint", endpoint, "http://HOST:PORT or https://HOST:PORT")
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ValueError(
            f"otlp_endpoint is {endpoint!r}, but OpenTelemetry is not installed: pip install 'chameleon-jax[otel]'"
        ) from error
    return OTLPSpanExporter(endpoint=endpoint)


class Phase(NamedTuple):
    """Phase of a request, from `begin` to `end` on the engine's clock, in seconds."""

    name: str
    begin: float
    end: float


def phases(request: Request) -> Iterator[Phase]:
    """Yield the phases of a finished request.

    The wait for its adapter overlaps the queue phase, or the prefill where the system holds steps back for loads.
    """
    times = request.metrics
    assert times.finished_time is not None
    started = times.first_scheduled_time
    yield Phase("queue", times.arrival_time, times.finished_time if started is None else started)
    if started is None:
        return
    if times.adapter_wait > 0:
        begin = started if times.adapter_awaited_since is None else times.adapter_awaited_since
        yield Phase("adapter_load_wait", begin, begin + times.adapter_wait)
    first = times.first_token_time
    yield Phase("prefill", started, times.finished_time if first is None else first)
    if first is not None:
        yield Phase("decode", first, times.finished_time)


def attributes(request: Request, model_name: str) -> dict[str, AttributeValue]:
    """Make a span's attributes by OpenTelemetry's conventions for generative AI. Others are named `chameleon.*`."""
    times, params, reason = request.metrics, request.params, request.finish_reason
    assert reason is not None
    values: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.id": request.request_id,
        "gen_ai.request.model": request.adapter_name or model_name,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.response.finish_reasons": (reason.value,),
        "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
        "gen_ai.usage.output_tokens": len(request.output_token_ids),
        "gen_ai.response.time_to_first_chunk": (
            None if times.first_token_time is None else times.first_token_time - times.arrival_time
        ),
        "chameleon.lora": request.adapter_name,
        "chameleon.adapter_was_resident": times.adapter_was_resident,
        "chameleon.adapter_wait_seconds": times.adapter_wait,
        "chameleon.queue": request.queue,
        "chameleon.num_preemptions": times.num_preemptions,
        "chameleon.num_faults": times.num_faults,
    }
    return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class _Ended:
    """Ended request, with one moment on two clocks: the engine's, in seconds, and Unix time in nanoseconds."""

    request: Request
    clock: float
    unix_ns: int

    def ns(self, seconds: float) -> int:
        """Convert a time of the engine's clock to Unix time in nanoseconds."""
        return self.unix_ns - round((self.clock - seconds) * 1e9)


class RequestTracer(Observer):
    """Observer of the engine that exports the spans of ended requests, from a thread of its own.

    The spans belong to the caller's trace where the request came with one, else to a trace of their own. A caller that does
    not record its trace (the flag `sampled` is 0) gets none, unless `OTEL_TRACES_SAMPLER` says otherwise. Requests lost with a
    dead engine get no spans.

    Args:
        exporter: Exporter that receives the spans.
        model_name: Name of the base model in requests.
        clock: Clock of the engine, in seconds.

    Attributes:
        num_dropped: Requests without spans because too many ended at once. `close` logs the number.
    """

    def __init__(self, exporter: SpanExporter, model_name: str, clock: Callable[[], float] = time.monotonic):
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self.num_dropped = 0
        self._model_name = model_name
        self._clock = clock
        self._provider = TracerProvider(resource=Resource.create({"service.name": "chameleon-jax"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("chameleon_jax")
        self._ended: queue.Queue[_Ended | None] = queue.Queue(MAX_QUEUED)
        self._thread = threading.Thread(target=self._run, name="tracer", daemon=True)
        self._thread.start()

    def finished(self, request: Request) -> None:
        try:
            self._ended.put_nowait(_Ended(request, self._clock(), time.time_ns()))
        except queue.Full:
            self.num_dropped += 1

    def close(self, timeout: float = 5.0) -> None:
        """Export the remaining spans. Args: timeout: most seconds to wait for them."""
        self._ended.put(None)
        self._thread.join(timeout)
        if self.num_dropped:
            logger.warning("%d requests have no spans: too many ended at once", self.num_dropped)

    def _run(self) -> None:
        while (ended := self._ended.get()) is not None:
            try:
                self._make_spans(ended)
            except Exception:
                logger.exception("cannot make the spans of request %r", ended.request.request_id)
        self._provider.shutdown()

    def _make_spans(self, ended: _Ended) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        request = ended.request
        times = request.metrics
        assert times.finished_time is not None
        root = self._tracer.start_span(
            "llm_request",
            TraceContextTextMapPropagator().extract(request.trace_context or {}, Context()),
            kind=SpanKind.SERVER,
            attributes=attributes(request, self._model_name),
            start_time=ended.ns(times.arrival_time),
        )
        if request.finish_reason is FinishReason.ERROR:
            root.set_status(Status(StatusCode.ERROR, str(request.stop_reason)))
        context = set_span_in_context(root, Context())
        for phase in phases(request):
            span = self._tracer.start_span(phase.name, context, start_time=ended.ns(phase.begin))
            span.end(ended.ns(phase.end))
        root.end(ended.ns(times.finished_time))
