from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence

import grpc
import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import LoRARequest, SamplingParams
from chameleon_jax.serving.rpc import chameleon_v1_pb2_grpc as stubs
from chameleon_jax.serving.telemetry.tracing import RequestTracer, otlp_exporter
from tests.serving.conftest import make_service
from tests.serving.rpc.calls import asked
from tests.serving.running import TIMEOUT

NOW = 1000.0
"""Time of the engine's clock."""


def spans_of(*requests: Request) -> Sequence[ReadableSpan]:
    exporter = InMemorySpanExporter()
    tracer = RequestTracer(exporter, "base", clock=lambda: NOW)
    for request in requests:
        tracer.finished(request)
    tracer.close()
    return exporter.get_finished_spans()


def ended(reason: FinishReason = FinishReason.STOP, **times: float | None) -> Request:
    request = Request(
        "r-1", [1, 2, 3], SamplingParams(max_tokens=9), arrival_time=NOW - 10, seed=0, adapter="h", adapter_name="a0"
    )
    request.finish_reason = reason
    request.output_token_ids = [4, 5]
    request.metrics.first_scheduled_time = NOW - 8
    request.metrics.first_token_time = NOW - 5
    request.metrics.finished_time = NOW - 1
    request.metrics.num_preemptions = 2
    for name, value in times.items():
        setattr(request.metrics, name, value)
    return request


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_the_spans_of_a_request():
    before = time.time()
    spans = {span.name: span for span in spans_of(ended(adapter_awaited_since=NOW - 9, adapter_wait=1.0))}
    assert {name: seconds(span) for name, span in spans.items()} == pytest.approx(
        {"llm_request": 9, "queue": 2, "adapter_load_wait": 1, "prefill": 3, "decode": 4}
    )
    root = spans.pop("llm_request")
    assert root.parent is None and root.context is not None
    assert all(span.parent is not None and span.parent.span_id == root.context.span_id for span in spans.values())
    assert root.end_time is not None and before - 1 <= root.end_time / 1e9 <= time.time() - 1  # it had ended a second earlier
    assert spans["queue"].end_time == spans["prefill"].start_time
    assert spans["prefill"].end_time == spans["decode"].start_time
    assert root.resource.attributes["service.name"] == "chameleon-jax"


def test_attributes():
    root = spans_of(ended())[-1]
    assert root.attributes is not None
    assert {
        "gen_ai.request.model": "a0",
        "gen_ai.request.id": "r-1",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 5.0,
        "chameleon.lora": "a0",
        "chameleon.num_preemptions": 2,
    }.items() <= dict(root.attributes).items()


def test_the_base_model_has_no_adapter():
    request = ended()
    request.adapter = request.adapter_name = None
    root = spans_of(request)[-1]
    assert root.attributes is not None
    assert root.attributes["gen_ai.request.model"] == "base" and "chameleon.lora" not in root.attributes


@pytest.mark.parametrize(
    "times, names",
    [
        ({"first_scheduled_time": None, "first_token_time": None}, {"queue": 9}),
        ({"first_token_time": None}, {"queue": 2, "prefill": 7}),
        ({"adapter_wait": 0.5}, {"queue": 2, "adapter_load_wait": 0.5, "prefill": 3, "decode": 4}),
    ],
)
def test_phases_of_requests_that_ended_early(times, names):
    spans = spans_of(ended(FinishReason.ABORT, **times))
    assert {span.name: seconds(span) for span in spans[:-1]} == pytest.approx(names)


def test_a_failed_request_says_why():
    request = ended(FinishReason.ERROR)
    request.stop_reason = "its adapter could not be loaded"
    root = spans_of(request)[-1]
    assert root.status.status_code is StatusCode.ERROR and root.status.description == "its adapter could not be loaded"


TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def traced(traceparent: str) -> Sequence[ReadableSpan]:
    request = ended()
    request.trace_context = {"traceparent": traceparent, "tracestate": "vendor=1"}
    return spans_of(request)


def test_spans_continue_the_callers_trace():
    spans = traced(f"00-{TRACE}-{SPAN}-01")
    root = spans[-1]
    assert {format(span.context.trace_id, "032x") for span in spans} == {TRACE}
    assert format(root.parent.span_id, "016x") == SPAN and root.parent.is_remote
    assert root.context.trace_state.get("vendor") == "1"


def test_a_caller_that_does_not_record_its_trace_gets_no_spans():
    assert traced(f"00-{TRACE}-{SPAN}-00") == ()


@pytest.mark.parametrize("traceparent", ["", "00-xyz", f"00-{'0' * 32}-{SPAN}-01"])
def test_an_invalid_traceparent_is_ignored(traceparent):
    root = traced(traceparent)[-1]
    assert root.parent is None and format(root.context.trace_id, "032x") != TRACE


def test_calls_over_both_protocols_continue_their_traces(server, shared_llm):
    exporter = InMemorySpanExporter()
    tracer = RequestTracer(exporter, "gqa", shared_llm.engine.clock)
    shared_llm.observers.append(tracer)
    headers = [{"traceparent": f"00-{TRACE}-{span:016x}-01"} for span in (1, 2)]
    try:
        body = {"prompt": "love is", "max_tokens": 2}
        httpx.post(f"{server.url}/v1/completions", json=body, headers=headers[0]).raise_for_status()
        httpx.post(f"{server.url}/v1/completions", json=body).raise_for_status()
        with grpc.insecure_channel(server.target) as channel:
            stubs.InferenceStub(channel).Generate(asked(2), metadata=tuple(headers[1].items()), timeout=TIMEOUT)
        asyncio.run(shared_llm.stats(max_age=0))  # observers have been called by now
    finally:
        shared_llm.observers.remove(tracer)
        tracer.close()
    roots = [span for span in exporter.get_finished_spans() if span.name == "llm_request"]
    assert [None if root.parent is None else root.parent.span_id for root in roots] == [1, None, 2]
    assert [format(root.context.trace_id, "032x") == TRACE for root in roots] == [True, False, True]


def test_dropped_spans_are_counted_and_logged(caplog):
    tracer = RequestTracer(InMemorySpanExporter(), "base")
    tracer.close()  # ends the thread that empties the queue
    tracer._ended.maxsize = 1
    for _ in range(3):
        tracer.finished(ended())
    assert tracer.num_dropped == 2
    tracer._ended.get()
    tracer.close()
    assert "2 requests have no spans" in caplog.text


def test_real_requests(shared_llm, adapter_dir):
    exporter = InMemorySpanExporter()

    async def serve() -> None:
        await make_service(shared_llm, adapter_dir).load_named({})
        tracer = RequestTracer(exporter, "gqa", shared_llm.engine.clock)
        shared_llm.observers.append(tracer)
        try:
            params = SamplingParams(max_tokens=4, ignore_eos=True)
            async for _ in shared_llm.generate("hello", params, LoRARequest("a1"), request_id="traced"):
                pass
            await shared_llm.stats(max_age=0)  # observers have been called by now
        finally:
            shared_llm.observers.remove(tracer)
            tracer.close()

    begin = time.time()
    asyncio.run(serve())
    end = time.time()
    spans = exporter.get_finished_spans()
    assert {"llm_request", "queue", "prefill", "decode"} <= {span.name for span in spans}
    root = spans[-1]
    assert root.attributes is not None and root.start_time is not None and root.end_time is not None
    assert root.attributes["gen_ai.request.id"] == "traced" and root.attributes["gen_ai.usage.output_tokens"] == 4
    assert begin - 0.1 <= root.start_time / 1e9 <= root.end_time / 1e9 <= end + 0.1
    for span in spans:
        assert span.start_time is not None and span.end_time is not None
        assert root.start_time <= span.start_time <= span.end_time <= root.end_time


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ValueError, match=r"pip install 'chameleon-jax\[otel\]'"):
        otlp_exporter("http://localhost:4317")


def test_an_endpoint_needs_a_scheme():
    with pytest.raises(ValueError, match="otlp_endpoint is 'localhost:4317'; allowed: http://"):
        otlp_exporter("localhost:4317")


def test_an_exporter_can_be_made():
    otlp_exporter("http://localhost:4317").shutdown()
