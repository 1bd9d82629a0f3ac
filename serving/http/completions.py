"""`POST /v1/completions`."""

from __future__ import annotations

import codecs
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from chameleon_jax.checkpoints.detokenizer import shown
from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.outputs import Delta, Logprob
from chameleon_jax.serving.http.access import KeyedRoute, require_access, service_of
from chameleon_jax.serving.http.answers import Answer, Choice, Head, JsonObject, Kind, prompt_logprobs
from chameleon_jax.serving.http.errors import ApiError, translate_errors
from chameleon_jax.serving.http.requests import CompletionRequest, timeout_of
from chameleon_jax.serving.http.responses import Completion
from chameleon_jax.serving.request_stream import RequestStream

router = APIRouter(prefix="/v1", tags=["completions"], route_class=KeyedRoute)

KIND = Kind("cmpl", "text_completion", "text_completion")


@router.post(
    "/completions",
    dependencies=[Depends(require_access)],
    response_model=Completion,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Complete a text, token ids, or several of either."""
    service, head = service_of(request), Head.of(request, body.model, KIND)
    with translate_errors(body.own_names()), body.name_language():
        most = service.config.max_choices
        params = body.sampling_params(body.max_tokens, body.logprobs, most, service.sampling_defaults)
        deadline = service.deadline(timeout_of(request))
        prompts = body.prompts()
        if len(prompts) * len(params) > most:
            raise ApiError(400, f"prompt and n are {len(prompts)} x {len(params)}; allowed: {most} choices", param="prompt")
        inputs = [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in prompts]
        lora = await service.adapter_of(body.model, body.mixed_loras(), deadline)
        fit = body.max_tokens is None
        streams = await service.llm.open_all(
            inputs, params, lora, head.id, deadline, fit=fit, priority=body.priority, prompt_only=body.prompt_only
        )
    beginnings = [_beginning(service.llm.tokenizer, body, prompt) for prompt in prompts]
    choices = [TextChoice(i, body, stream, *beginnings[i // len(params)]) for i, stream in enumerate(streams)]
    prompt_tokens = sum(len(stream.prompt_token_ids) for stream in streams[:: len(params)])
    return await Answer(request, body, head, streams, choices, prompt_tokens).respond()


class TextChoice(Choice):
    """One choice of a completion.

    Args:
        body: Body of the request.
        stream: Output of the engine.
        echo: Text of the prompt, sent before the output; empty where it is not wanted.
        pending: First bytes of a character that the prompt leaves incomplete.
    """

    def __init__(self, index: int, body: CompletionRequest, stream: RequestStream, echo: str, pending: bytes):
        self._index, self._body, self._stream = index, body, stream
        self._echo, self._prompt = echo, echo.encode(errors="replace")
        self._has_begun = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0  # characters of the tokens so far
        if not self._scores_prompt:
            self._length = len(echo)
            self._utf8.decode(pending)

    @property
    def _scores_prompt(self) -> bool:
        """Whether log-probabilities begin with the prompt's."""
        return bool(self._body.echo) and self._body.logprobs is not None

    def part(self, delta: Delta) -> JsonObject | None:
        if not (delta.text or self._echo or delta.finish_reason or delta.logprobs):
            return None
        return self.whole(delta)

    def whole(self, output: Delta) -> JsonObject:
        new, logprobs = (output.text, output.logprobs) if not self._body.prompt_only else ("", output.logprobs and [])
        text, self._echo = self._echo + new, ""
        found = None if logprobs is None else self._logprobs(logprobs)
        self._has_begun = True
        choice = {
            "index": self._index,
            "text": text,
            "logprobs": found,
            "finish_reason": "length" if self._body.prompt_only and output.finish_reason == "stop" else output.finish_reason,
            "stop_reason": None if self._body.prompt_only else output.stop_reason,
        }
        return choice if self._body.prompt_logprobs is None else choice | {"prompt_logprobs": prompt_logprobs(self._stream)}

    def _logprobs(self, logprobs: list[dict[int, Logprob]]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if self._scores_prompt and not self._has_begun:
            logprobs = self._of_prompt(out) + logprobs
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

    def _of_prompt(self, out: dict[str, list[Any]]) -> list[dict[int, Logprob]]:
        """Log-probabilities of the prompt's tokens behind the first, which has none and is put into `out`."""
        stream, first = self._stream, self._stream.prompt_token_ids[0]
        data = b"" if stream.tokenizer is None else stream.tokenizer.token_bytes.at_start(first)
        out["tokens"].append(shown(data) if data else f"token_id:{first}")
        out["token_logprobs"].append(None)
        out["top_logprobs"].append(None)
        out["text_offset"].append(0)
        special = stream.tokenizer is not None and first in stream.tokenizer.token_bytes.special_ids
        self._offset(b"" if special and not self._prompt.startswith(data) else data)  # the tokenizer adds it to a text
        return [position for position in stream.prompt_logprobs() or () if position is not None]

    def _offset(self, data: bytes) -> int:
        """Index of the character in which the next token begins. Args: data: the token's UTF-8 bytes."""
        if not data:
            return self._length
        self._length += len(self._utf8.decode(data[:1]))
        offset = self._length - 1 + bool(self._utf8.getstate()[0])
        self._length += len(self._utf8.decode(data[1:]))
        return offset


def _beginning(tokenizer: Tokenizer | None, body: CompletionRequest, prompt: str | list[int]) -> tuple[str, bytes]:
    """`(echo, pending)` of `TextChoice`: the completion has the character that the prompt leaves incomplete."""
    if isinstance(prompt, str):
        return prompt if body.echo else "", b""
    if tokenizer is None:
        return "", b""
    if not body.echo:
        return "", tokenizer.stream(body.skip_special_tokens, prompt).pending
    stream = tokenizer.stream(body.skip_special_tokens)
    return "".join(map(stream.append, prompt)), stream.pending
