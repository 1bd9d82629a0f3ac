"""`chameleon.v1.Inference`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from grpc.aio import ServicerContext

from chameleon_jax.errors import DeadlineExceeded
from chameleon_jax.outputs import Delta
from chameleon_jax.request import Request
from chameleon_jax.serving.request_stream import RequestStream
from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages
from chameleon_jax.serving.rpc import chameleon_v1_pb2_grpc as stubs
from chameleon_jax.serving.rpc import convert
from chameleon_jax.serving.rpc.interceptor import access_fields
from chameleon_jax.serving.service.service import REQUEST_ID, Service


class Inference(stubs.InferenceServicer):
    """Completions, whole or streamed. Errors become status codes in `RpcInterceptor`."""

    def __init__(self, service: Service):
        self._service = service

    async def Generate(self, request: messages.GenerateRequest, context: ServicerContext) -> messages.GenerateResponse:
        async with await self._open(request, context) as stream:
            output = Delta.join([delta async for delta in stream])
        return messages.GenerateResponse(**_output(stream, output), **_end(stream, output, len(output.token_ids)))

    async def GenerateStream(
        self, request: messages.GenerateRequest, context: ServicerContext
    ) -> AsyncIterator[messages.GenerateStreamResponse]:
        num_tokens = 0
        async with await self._open(request, context) as stream:
            async for delta in stream:
                num_tokens += len(delta.token_ids)
                end = {} if delta.finish_reason is None else _end(stream, delta, num_tokens)
                yield messages.GenerateStreamResponse(**_output(stream, delta), **end)

    async def _open(self, request: messages.GenerateRequest, context: ServicerContext) -> RequestStream:
        if request.request_id and not REQUEST_ID.fullmatch(request.request_id):
            raise ValueError(
                f"request_id is {request.request_id[:128]!r}; allowed: 1 to 128 printable ASCII characters, or empty"
            )
        request_id = access_fields.get()["request_id"]  # the client's, or a new one from `RpcInterceptor`
        field = request.WhichOneof("prompt")
        if field is None:
            raise ValueError("prompt is missing; allowed: text or token_ids")
        prompt = request.text if field == "text" else {"prompt_token_ids": list(request.token_ids.ids)}
        params = convert.sampling_from_message(request.sampling, self._service.sampling_defaults)
        timeout = context.time_remaining()
        if timeout is not None and timeout <= 0:
            raise DeadlineExceeded("the deadline of the call has passed")
        deadline = self._service.deadline(timeout)
        mixed = [(lora.lora_name, lora.weight if lora.HasField("weight") else 1.0) for lora in request.loras]
        lora = await self._service.adapter_of(request.lora_name, mixed, deadline)
        fit = not request.sampling.HasField("max_tokens")
        (stream,) = await self._service.llm.open_all(
            [prompt], [params], lora, request_id, deadline, fit=fit, priority=request.priority
        )
        access_fields.get()["model"] = request.lora_name or self._service.model_name
        return stream


def _output(stream: RequestStream, delta: Delta) -> dict[str, Any]:
    """Fields of every response."""
    return {
        "request_id": stream.request_id,
        "text": delta.text,
        "token_ids": delta.token_ids,
        "logprobs": convert.logprobs_to_messages(delta.logprobs),
    }


def _end(stream: RequestStream, delta: Delta, num_tokens: int) -> dict[str, Any]:
    """Further fields of the last response. Args: num_tokens: output tokens of the request."""
    assert stream.request is not None
    usage = messages.Usage(prompt_tokens=len(stream.prompt_token_ids), completion_tokens=num_tokens)
    access_fields.get().update(prompt_tokens=usage.prompt_tokens, completion_tokens=num_tokens)
    return {
        "finish_reason": convert.FINISH_REASONS[delta.finish_reason],
        "stop_reason": convert.stop_reason_to_message(delta.stop_reason),
        "usage": usage,
        "timing": _timing(stream.request),
        "prompt_logprobs": convert.logprobs_to_messages([position or {} for position in stream.prompt_logprobs() or ()]),
    }


def _timing(request: Request) -> messages.Timing:
    times = request.metrics
    begin = times.arrival_time
    return messages.Timing(
        queue=0.0 if times.first_scheduled_time is None else times.first_scheduled_time - begin,
        first_token=0.0 if times.first_token_time is None else times.first_token_time - begin,
        total=0.0 if times.finished_time is None else times.finished_time - begin,
    )
