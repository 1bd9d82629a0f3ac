"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from chameleon_jax.outputs import Logprob
from chameleon_jax.serving.http.access import KeyedRoute, require_access, service_of
from chameleon_jax.serving.http.errors import answered
from chameleon_jax.serving.http.requests import ChatRequest
from chameleon_jax.serving.http.responses import ChatCompletion
from chameleon_jax.serving.http.streams import (
    EventStream,
    merged,
    note_usage,
    timeout_of,
    until_gone,
    unused_id,
    usage,
    usage_so_far,
)
from chameleon_jax.serving.updates import Delta

router = APIRouter(prefix="/v1", tags=["chat"], route_class=KeyedRoute)


@router.post(
    "/chat/completions",
    dependencies=[Depends(require_access)],
    response_model=ChatCompletion,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
    """Answers a conversation, through the model's chat template."""
    service, created = service_of(request), int(time.time())
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    most = service.config.max_choices
    with answered():
        lora = service.lora_named(body.model)
        wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        defaults = {"max_tokens": service.llm.max_model_len, **service.sampling_defaults}
        params = body.sampling_params(wanted, logprobs, most, defaults)
        deadline = service.deadline(timeout_of(request))
        async with deadline.kept():
            messages = [message.for_template() for message in body.messages]
            token_ids = await service.chat_tokens(messages, **body.template_variables())
        request_id = unused_id("chatcmpl", request)
        prompt, fit = {"prompt_token_ids": token_ids}, wanted is None
        streams = await service.llm.open_all([prompt], params, lora, request_id, deadline, fit=fit)
    model = body.model or service.model_name
    completion_tokens = 0

    def head(kind: str, **rest: Any) -> dict[str, Any]:
        return {"id": request_id, "object": kind, "created": created, "model": model, **rest}

    def counted() -> dict[str, int]:
        note_usage(request, model, len(token_ids), completion_tokens)
        return usage(len(token_ids), completion_tokens)

    def chunk(i: int, delta: dict[str, str], logprobs: Any = None, finish: Any = None, stop: Any = None) -> dict[str, Any]:
        choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": finish, "stop_reason": stop}
        return head("chat.completion.chunk", choices=[choice])

    def begin() -> list[dict[str, Any]]:
        return [chunk(i, {"role": "assistant", "content": ""}) for i in range(len(streams))]

    def events(i: int, delta: Delta) -> list[dict[str, Any]]:
        nonlocal completion_tokens
        completion_tokens += len(delta.token_ids)
        if not (delta.text or delta.finish_reason or delta.logprobs):
            return []
        content = {"content": delta.text} if delta.text else {}
        said = chunk(i, content, _logprobs(delta.logprobs, body.top_logprobs), delta.finish_reason, delta.stop_reason)
        return [said | usage_so_far(body.stream_options, len(token_ids), completion_tokens)]

    def end() -> list[dict[str, Any]]:
        counts = counted()
        wanted = body.stream_options is not None and body.stream_options.include_usage
        return [head("chat.completion.chunk", choices=[], usage=counts)] if wanted else []

    if body.stream:
        return EventStream(streams, events, begin, end)

    async def collect() -> dict[str, Any]:
        nonlocal completion_tokens
        texts = [""] * len(streams)
        found: list[list[dict[int, Logprob]]] = [[] for _ in streams]
        choices: list[dict[str, Any]] = [{} for _ in streams]
        with answered():
            async for i, delta in merged(streams):
                completion_tokens += len(delta.token_ids)
                texts[i] += delta.text
                found[i] += delta.logprobs or []
                choices[i] = {"index": i, "finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
        for choice, text, positions in zip(choices, texts, found):
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            choice["logprobs"] = _logprobs(positions if body.logprobs else None, body.top_logprobs)
        return head("chat.completion", choices=choices, usage=counted())

    try:
        return JSONResponse(await until_gone(request, collect()))
    finally:
        for stream in streams:
            stream.close()


def _logprobs(positions: list[dict[int, Logprob]] | None, num_top: int | None) -> dict[str, Any] | None:
    """Args: num_top: entries at each position; the chosen token is first in `positions`, and may be less likely than those."""
    if positions is None:
        return None
    content = []
    for position in positions:
        entries = [_entry(logprob) for logprob in position.values()]
        top = sorted(entries, key=lambda entry: -entry["logprob"])[: num_top or 0]
        content.append({**entries[0], "top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(logprob: Logprob) -> dict[str, Any]:
    return {"token": logprob.decoded_token or "", "logprob": logprob.logprob, "bytes": list(logprob.token_bytes or b"")}
