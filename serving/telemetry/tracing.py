"""OpenTelemetry traces: the spans of each request, made from its times when it has ended. Needs the extra `otel`."""

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
"""Ended requests whose spans are not made yet; those that come while there are as many have none."""


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Sends spans to a collector over gRPC. Raises ValueError; also where the extra is missing."""
    require(endpoint.startswith(("http://", "https://")), "otlp_endpoint", endpoint, "http://HOST:PORT or https://HOST:PORT")
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ValueError(
            f"otlp_endpoint is {endpoint!r}, but OpenTelemetry is not installed: pip install 'chameleon-jax[otel]'"
        ) from error
    return OTLPSpanExporter(endpoint=endpoint)


class Phase(NamedTuple):
    """A part of a request's life, from `begin` to `end` on the engine's clock, in seconds."""

    name: str
    begin: float
    end: float


def phases(request: Request) -> Iterator[Phase]:
    """What a request went through. The wait for its adapter lies within the queue, or where the system holds steps back for
    loads, within the prefill."""
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
    """After OpenTelemetry's conventions for generative AI; what these lack is under `chameleon`."""
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
        "chameleon.num_squashes": times.num_squashes,
        "chameleon.num_faults": times.num_faults,
    }
    return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class _Ended:
    """A request and the same moment on two clocks: the engine's, in seconds, and Unix time in nanoseconds."""

    request: Request
    clock: float
    unix_ns: int

    def ns(self, seconds: float) -> int:
        return self.unix_ns - round((self.clock - seconds) * 1e9)


class RequestTracer(Observer):
    """An observer of the engine. Spans are made in a thread of its own.

    Args:
        model_name: what requests call the base model.
        clock: the engine's.

    Attributes:
        num_dropped: requests without spans, as too many ended at once; `close` logs how many. (Those that are lost with the
            engine have none either.)
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
        """Sends what is left, for as many seconds at most."""
        self._ended.put(None)
        self._thread.join(timeout)
        if self.num_dropped:
            logger.warning("%d requests have no spans: too many ended at once", self.num_dropped)

    def _run(self) -> None:
        while (ended := self._ended.get()) is not None:
            try:
                self._make_spans(ended)
            except Exception:
                logger.exception("the spans of request %r could not be made", ended.request.request_id)
        self._provider.shutdown()

    def _make_spans(self, ended: _Ended) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        request = ended.request
        times = request.metrics
        assert times.finished_time is not None
        root = self._tracer.start_span(
            "llm_request",
            Context(),
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
