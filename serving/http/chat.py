"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from chameleon_jax.outputs import Delta, Logprob
from chameleon_jax.serving.http.access import KeyedRoute, require_access, service_of
from chameleon_jax.serving.http.answers import Answer, Choice, Head, JsonObject, Kind
from chameleon_jax.serving.http.errors import translate_errors
from chameleon_jax.serving.http.requests import ChatRequest, timeout_of
from chameleon_jax.serving.http.responses import ChatCompletion

router = APIRouter(prefix="/v1", tags=["chat"], route_class=KeyedRoute)

KIND = Kind("chatcmpl", "chat.completion", "chat.completion.chunk")


@router.post(
    "/chat/completions",
    dependencies=[Depends(require_access)],
    response_model=ChatCompletion,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation, formatted by the model's chat template."""
    service, head = service_of(request), Head.of(request, body.model, KIND)
    with translate_errors():
        lora = service.lora_named(body.model)
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        defaults = {"max_tokens": service.llm.max_model_len, **service.sampling_defaults}
        params = body.sampling_params(max_tokens, logprobs, service.config.max_choices, defaults)
        deadline = service.deadline(timeout_of(request))
        async with deadline.kept():
            messages = [message.for_template() for message in body.messages]
            token_ids = await service.chat_tokens(messages, **body.template_variables())
        prompts, fit = [{"prompt_token_ids": token_ids}], max_tokens is None
        streams = await service.llm.open_all(prompts, params, lora, head.id, deadline, fit=fit, priority=body.priority)
    choices = [ChatChoice(i, body.top_logprobs or 0) for i in range(len(streams))]
    return await Answer(request, body, head, streams, choices, len(token_ids)).respond()


class ChatChoice(Choice):
    """One choice of a chat completion.

    Args:
        num_top: Alternatives to list at each token.
    """

    def __init__(self, index: int, num_top: int):
        self._index = index
        self._num_top = num_top

    def opening(self) -> JsonObject:
        return self._event({"role": "assistant", "content": ""})

    def part(self, delta: Delta) -> JsonObject | None:
        if not (delta.text or delta.finish_reason or delta.logprobs):
            return None
        content = {"content": delta.text} if delta.text else {}
        return self._event(content, self._logprobs(delta), delta.finish_reason, delta.stop_reason)

    def whole(self, output: Delta) -> JsonObject:
        return {
            "index": self._index,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs(output),
        }

    def _event(self, delta: dict[str, str], logprobs: Any = None, finish: Any = None, stop: Any = None) -> JsonObject:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish, "stop_reason": stop}

    def _logprobs(self, output: Delta) -> JsonObject | None:
        if output.logprobs is None:
            return None
        content = []
        for position in output.logprobs:
            entries = [_logprob_entry(logprob) for logprob in position.values()]
            chosen, top = entries[0], sorted(entries, key=lambda entry: -entry["logprob"])[: self._num_top]
            content.append({**chosen, "top_logprobs": top})
        return {"content": content, "refusal": None}


def _logprob_entry(logprob: Logprob) -> JsonObject:
    return {"token": logprob.decoded_token or "", "logprob": logprob.logprob, "bytes": list(logprob.token_bytes or b"")}
