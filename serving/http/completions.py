"""`POST /v1/completions`."""

from __future__ import annotations

import codecs
import time
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.outputs import Logprob
from chameleon_jax.serving.http.access import KeyedRoute, require_access, service_of
from chameleon_jax.serving.http.errors import ApiError, answered
from chameleon_jax.serving.http.requests import CompletionRequest
from chameleon_jax.serving.http.responses import Completion
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

router = APIRouter(prefix="/v1", tags=["completions"], route_class=KeyedRoute)


class _Choice:
    """What is said of one choice so far.

    Args:
        pending: bytes of a character that the prompt ends inside of.
    """

    def __init__(self, echo: str, pending: bytes):
        self.echo = echo
        self._length = len(echo)  # characters of the tokens so far
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._utf8.decode(pending)

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        text, self.echo = self.echo + delta.text, ""
        return {
            "index": index,
            "text": text,
            "logprobs": None if delta.logprobs is None else self._logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def _logprobs(self, logprobs: list[dict[int, Logprob]]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for position in logprobs:
            top: dict[str, float] = {}
            for token_id, logprob in position.items():
                token = logprob.decoded_token
                top[f"token_id:{token_id}" if token is None or token in top else token] = logprob.logprob
            chosen = next(iter(position.values()))
            out["tokens"].append(next(iter(top)))
            out["token_logprobs"].append(chosen.logprob)
            out["top_logprobs"].append(top)
            out["text_offset"].append(self._offset(chosen.token_bytes or b""))
        return out

    def _offset(self, data: bytes) -> int:
        """The character of the text in which the next token begins."""
        if not data:
            return self._length
        self._length += len(self._utf8.decode(data[:1]))
        offset = self._length - 1 + bool(self._utf8.getstate()[0])
        self._length += len(self._utf8.decode(data[1:]))
        return offset


@router.post(
    "/completions",
    dependencies=[Depends(require_access)],
    response_model=Completion,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Goes on from a text, from token ids, or from several of either."""
    service, created = service_of(request), int(time.time())
    with answered():
        lora = service.lora_named(body.model)
        params = body.sampling_params(body.max_tokens, body.logprobs, service.config.max_choices, service.sampling_defaults)
        deadline = service.deadline(timeout_of(request))
        prompts = body.prompts()
        if len(prompts) * len(params) > (most := service.config.max_choices):
            raise ApiError(400, f"prompt and n are {len(prompts)} x {len(params)}; allowed: {most} choices", param="prompt")
        asked = [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in prompts]
        request_id = unused_id("cmpl", request)
        fit = body.max_tokens is None
        streams = await service.llm.open_all(asked, params, lora, request_id, deadline, fit=fit)
    model = body.model or service.model_name
    prompt_tokens = sum(len(stream.prompt_token_ids) for stream in streams[:: len(params)])
    begins = [_begin(service.llm.tokenizer, body, prompt) for prompt in prompts]
    choices = [_Choice(*begin) for begin in begins for _ in params]
    completion_tokens = 0

    def head(**rest: Any) -> dict[str, Any]:
        return {"id": request_id, "object": "text_completion", "created": created, "model": model, **rest}

    def counted() -> dict[str, int]:
        note_usage(request, model, prompt_tokens, completion_tokens)
        return usage(prompt_tokens, completion_tokens)

    def events(i: int, delta: Delta) -> list[dict[str, Any]]:
        nonlocal completion_tokens
        completion_tokens += len(delta.token_ids)
        if not (delta.text or choices[i].echo or delta.finish_reason or delta.logprobs):
            return []
        so_far = usage_so_far(body.stream_options, prompt_tokens, completion_tokens)
        return [head(choices=[choices[i].chunk(i, delta)], **so_far)]

    def end() -> list[dict[str, Any]]:
        counts = counted()
        wanted = body.stream_options is not None and body.stream_options.include_usage
        return [head(choices=[], usage=counts)] if wanted else []

    if body.stream:
        return EventStream(streams, events, list, end)

    async def collect() -> dict[str, Any]:
        nonlocal completion_tokens
        whole: list[dict[str, Any]] = [{} for _ in streams]
        with answered():
            async for i, delta in merged(streams):
                completion_tokens += len(delta.token_ids)
                whole[i] = _joined(whole[i], choices[i].chunk(i, delta))
        return head(choices=whole, usage=counted())

    try:
        return JSONResponse(await until_gone(request, collect()))
    finally:
        for stream in streams:
            stream.close()


def _begin(tokenizer: Tokenizer | None, body: CompletionRequest, prompt: str | list[int]) -> tuple[str, bytes]:
    """The prompt's text where it is wanted, and the bytes of a character that it ends inside of: the completion has that."""
    if isinstance(prompt, str):
        return prompt if body.echo else "", b""
    if tokenizer is None:
        return "", b""
    if not body.echo:
        return "", tokenizer.stream(body.skip_special_tokens, prompt).pending
    stream = tokenizer.stream(body.skip_special_tokens)
    return "".join(map(stream.append, prompt)), stream.pending


def _joined(before: dict[str, Any], chunk: dict[str, Any]) -> dict[str, Any]:
    if not before:
        return chunk
    logprobs = chunk["logprobs"]
    if logprobs is not None:
        logprobs = {key: before["logprobs"][key] + values for key, values in logprobs.items()}
    return {**chunk, "text": before["text"] + chunk["text"], "logprobs": logprobs}
