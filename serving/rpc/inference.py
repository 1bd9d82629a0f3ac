"""`chameleon.v1.Inference`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from chameleon_jax.errors import DeadlineExceeded
from chameleon_jax.request import Request
from chameleon_jax.serving.request_stream import RequestStream
from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages
from chameleon_jax.serving.rpc import chameleon_v1_pb2_grpc as stubs
from chameleon_jax.serving.rpc.convert import (
    FINISH_REASONS,
    logprobs_to_messages,
    sampling_from_message,
    stop_reason_to_message,
)
from chameleon_jax.serving.rpc.edge import REQUEST_ID, notes
from chameleon_jax.serving.service.service import Service
from chameleon_jax.serving.updates import Delta


class Inference(stubs.InferenceServicer):
    """Raises what `Edge` makes status codes of."""

    def __init__(self, service: Service):
        self._service = service

    async def Generate(self, request: messages.GenerateRequest, context: grpc.aio.ServicerContext) -> messages.GenerateResponse:
        async with await self._open(request, context) as stream:
            deltas = [delta async for delta in stream]
        logprobs = None if deltas[-1].logprobs is None else [p for delta in deltas for p in delta.logprobs or ()]
        token_ids = [t for delta in deltas for t in delta.token_ids]
        return messages.GenerateResponse(
            request_id=stream.request_id,
            text="".join(delta.text for delta in deltas),
            token_ids=token_ids,
            logprobs=logprobs_to_messages(logprobs),
            **_end(stream, deltas[-1], len(token_ids)),
        )

    async def GenerateStream(
        self, request: messages.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[messages.GenerateStreamResponse]:
        num_tokens = 0
        async with await self._open(request, context) as stream:
            async for delta in stream:
                num_tokens += len(delta.token_ids)
                yield messages.GenerateStreamResponse(
                    request_id=stream.request_id,
                    text=delta.text,
                    token_ids=delta.token_ids,
                    logprobs=logprobs_to_messages(delta.logprobs),
                    **({} if delta.finish_reason is None else _end(stream, delta, num_tokens)),
                )

    async def _open(self, request: messages.GenerateRequest, context: grpc.aio.ServicerContext) -> RequestStream:
        if request.request_id and not REQUEST_ID.fullmatch(request.request_id):
            raise ValueError(
                f"request_id is {request.request_id[:128]!r}; allowed: 1 to 128 printable ASCII characters, or none at all"
            )
        request_id = notes.get()["request_id"]  # the client's, or one that `Edge` made
        field = request.WhichOneof("prompt")
        if field is None:
            raise ValueError("prompt is missing; allowed: text or token_ids")
        prompt = request.text if field == "text" else {"prompt_token_ids": list(request.token_ids.ids)}
        params = sampling_from_message(request.sampling, self._service.sampling_defaults)
        lora = self._service.lora_named(request.lora_name)
        timeout = context.time_remaining()
        if timeout is not None and timeout <= 0:
            raise DeadlineExceeded("the call's deadline is over")
        deadline = self._service.deadline(timeout)
        fit = not request.sampling.HasField("max_tokens")
        (stream,) = await self._service.llm.open_all([prompt], [params], lora, request_id, deadline, fit=fit)
        notes.get()["model"] = request.lora_name or self._service.model_name
        return stream


def _end(stream: RequestStream, delta: Delta, num_tokens: int) -> dict[str, Any]:
    """The fields of the last message."""
    assert stream.request is not None
    usage = messages.Usage(prompt_tokens=len(stream.prompt_token_ids), completion_tokens=num_tokens)
    notes.get().update(prompt_tokens=usage.prompt_tokens, completion_tokens=num_tokens)
    return {
        "finish_reason": FINISH_REASONS[delta.finish_reason],
        "stop_reason": stop_reason_to_message(delta.stop_reason),
        "usage": usage,
        "timing": _timing(stream.request),
    }


def _timing(request: Request) -> messages.Timing:
    times = request.metrics
    begin = times.arrival_time
    return messages.Timing(
        queue=0.0 if times.first_scheduled_time is None else times.first_scheduled_time - begin,
        first_token=0.0 if times.first_token_time is None else times.first_token_time - begin,
        total=0.0 if times.finished_time is None else times.finished_time - begin,
    )
