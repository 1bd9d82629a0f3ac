"""`POST /v1/chat/completions`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.outputs import Delta, Logprob
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.serving.http.access import KeyedRoute, require_access, service_of
from chameleon_jax.serving.http.answers import Answer, Choice, Head, JsonObject, Kind
from chameleon_jax.serving.http.errors import ApiError, translate_errors
from chameleon_jax.serving.http.requests import ChatRequest, timeout_of
from chameleon_jax.serving.http.responses import ChatCompletion
from chameleon_jax.serving.tools.call_parser import CallPiece, Parsed
from chameleon_jax.serving.tools.tool_choice import ToolChoice

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
    with translate_errors(body.own_names()), body.name_language():
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        defaults = {"max_tokens": service.llm.max_model_len, **service.sampling_defaults}
        params = body.sampling_params(max_tokens, logprobs, service.config.max_choices, defaults)
        tools, tokenizer = body.chosen_tools(service.tool_style), service.llm.tokenizer
        if tools is not None:
            params = [_for_tools(param, tools, tokenizer) for param in params]
        deadline = service.deadline(timeout_of(request))
        async with deadline.kept():
            token_ids = await body.chat_tokens(service, body.messages)
        lora = await service.adapter_of(body.model, body.mixed_loras(), deadline)
        prompt, fit = {"prompt_token_ids": token_ids}, max_tokens is None
        streams = await service.llm.open_all([prompt], params, lora, head.id, deadline, fit=fit, priority=body.priority)
    role = "assistant" if body.add_generation_prompt else body.messages[-1].role
    shows_specials = body.skip_special_tokens and not params[0].skip_special_tokens
    hidden = tokenizer.end_tokens if shows_specials and tokenizer is not None else ()
    choices = [ChatChoice(i, body.top_logprobs or 0, role, tools, hidden) for i in range(len(streams))]
    return await Answer(request, body, head, streams, choices, len(token_ids)).respond()


def _for_tools(params: SamplingParams, tools: ToolChoice, tokenizer: Tokenizer | None) -> SamplingParams:
    """Constrain a forced call, and keep special tokens in the text where calls are marked by one. Raises ApiError."""
    form = tools.structured_outputs()
    if form is not None:
        if params.structured_outputs is not None:
            message = f"tool_choice is {tools.mode}; allowed: not together with response_format or structured_outputs"
            raise ApiError(400, message, param="tool_choice")
        return dataclasses.replace(params, structured_outputs=form)
    is_special = tokenizer is not None and tokenizer.is_special(tools.style.marker)
    return dataclasses.replace(params, skip_special_tokens=False) if is_special else params


class ChatChoice(Choice):
    """One choice of a chat completion.

    Args:
        num_top: Alternatives to list at each token.
        role: Role of the message.
        tools: Tools that the answer may call; None for an answer without calls.
        hidden: Special tokens to leave out of an answer with tools.
    """

    def __init__(
        self, index: int, num_top: int, role: str = "assistant", tools: ToolChoice | None = None, hidden: Sequence[str] = ()
    ):
        self._index = index
        self._num_top = num_top
        self._role = role
        self._tools = tools
        self._parser = None if tools is None else tools.parser(hidden)
        self._called = False

    def opening(self) -> JsonObject:
        return self._event({"role": self._role, "content": "" if self._tools is None else None})

    def part(self, delta: Delta) -> JsonObject | None:
        parsed = self._parse(delta)
        if not (parsed.content or parsed.calls or delta.finish_reason or delta.logprobs):
            return None
        changes: JsonObject = {"content": parsed.content} if parsed.content else {}
        if parsed.calls:
            changes["tool_calls"] = [{"index": call.index, **self._call(call)} for call in parsed.calls]
        return self._event(changes, self._logprobs(delta), self._finish_reason(delta), delta.stop_reason)

    def whole(self, output: Delta) -> JsonObject:
        content, calls = self._parse(output)
        message: JsonObject = {"role": self._role, "content": content or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = [self._call(call) for call in calls]
        return {
            "index": self._index,
            "finish_reason": self._finish_reason(output),
            "stop_reason": output.stop_reason,
            "message": message,
            "logprobs": self._logprobs(output),
        }

    def _parse(self, delta: Delta) -> Parsed:
        if self._parser is None:
            return Parsed(delta.text, [])
        parsed = self._parser.feed(delta.text, final=delta.finish_reason is not None)
        self._called = self._called or bool(parsed.calls)
        return parsed

    def _finish_reason(self, delta: Delta) -> str | None:
        return delta.finish_reason if self._tools is None else self._tools.finish_reason(delta.finish_reason, self._called)

    def _call(self, call: CallPiece) -> JsonObject:
        """Convert part of a call; only the first has an id, type and name."""
        if call.name is None or self._tools is None:
            return {"function": {"arguments": call.arguments}}
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": self._tools.style.call_id(), "type": "function", "function": function}

    def _event(self, delta: JsonObject, logprobs: Any = None, finish: Any = None, stop: Any = None) -> JsonObject:
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
