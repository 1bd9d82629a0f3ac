"""Answers to completion requests: choices that grow with the engine's output, sent whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from chameleon_jax.errors import ServingError
from chameleon_jax.outputs import Delta
from chameleon_jax.serving.http.access import service_of
from chameleon_jax.serving.http.errors import api_error, translate_errors
from chameleon_jax.serving.http.requests import ChatRequest, Sampling
from chameleon_jax.serving.http.streams import merge, run_while_connected
from chameleon_jax.serving.request_stream import RequestStream

JsonObject = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Kind:
    """Names that OpenAI's API gives to one kind of answer: the prefix of its id, the whole, and an event of its stream."""

    id_prefix: str
    whole: str
    event: str


@dataclasses.dataclass(frozen=True)
class Head:
    """Fields that every JSON object of one answer begins with. Made when the request arrives.

    Attributes:
        id: Request id for the engine. Unique, although a client may send its own id with several requests at once.
        created: Unix time of arrival, seconds.
    """

    kind: Kind
    id: str
    created: int
    model: str

    @classmethod
    def of(cls, request: Request, model: str | None, kind: Kind) -> Head:
        own_id = f"{kind.id_prefix}-{request.state.request_id}-{uuid.uuid4().hex[:8]}"
        service = service_of(request)
        if not model or model in service.model_names:
            model = service.model_name
        return cls(kind, own_id, int(time.time()), model)

    def whole(self, choices: Sequence[JsonObject], **rest: Any) -> JsonObject:
        return self._object(self.kind.whole, choices, rest)

    def event(self, *choices: JsonObject, **rest: Any) -> JsonObject:
        return self._object(self.kind.event, choices, rest)

    def _object(self, name: str, choices: Sequence[JsonObject], rest: JsonObject) -> JsonObject:
        head = {"id": self.id, "object": name, "created": self.created, "model": self.model}
        return {**head, "choices": list(choices), **rest}


class Choice(ABC):
    """One choice of an answer, as JSON objects."""

    def opening(self) -> JsonObject | None:
        """Choice of the event sent before any output. None sends no such event."""
        return None

    @abstractmethod
    def part(self, delta: Delta) -> JsonObject | None:
        """Choice of the event for new output. None where the client would learn nothing."""

    @abstractmethod
    def whole(self, output: Delta) -> JsonObject:
        """Choice of an answer that is not streamed. Args: output: all output, joined."""


def prompt_logprobs(stream: RequestStream) -> list[JsonObject | None] | None:
    """Log-probabilities of a prompt's tokens in vLLM's form, None at the first one. None where they were not requested."""
    positions = stream.prompt_logprobs()
    if positions is None:
        return None
    return [
        None
        if position is None
        else {str(i): {"logprob": p.logprob, "decoded_token": p.decoded_token} for i, p in position.items()}
        for position in positions
    ]


@dataclasses.dataclass(eq=False, repr=False)  # a prompt must not get into a log
class Answer:
    """Answer to one completion request.

    Attributes:
        request: The HTTP request. Its access-log record gets the token counts.
        body: Body of the request.
        head: Makes the parts of the answer that all choices share.
        streams: Output of the engine, one stream for each choice. Closed once the answer is sent or the client is gone.
        choices: Makes the parts of each choice.
        prompt_tokens: Tokens of all prompts together.
        completion_tokens: Output tokens of all choices so far.
    """

    request: Request
    body: Sampling
    head: Head
    streams: Sequence[RequestStream]
    choices: Sequence[Choice]
    prompt_tokens: int
    completion_tokens: int = 0

    async def respond(self) -> Response:
        if self.body.stream:
            return EventStream(self)
        try:
            return JSONResponse(await run_while_connected(self.request.receive, self._collect()))
        finally:
            self.close()

    def close(self) -> None:
        for stream in self.streams:
            stream.close()

    async def _collect(self) -> JsonObject:
        deltas: list[list[Delta]] = [[] for _ in self.streams]
        with translate_errors():
            async for i, delta in merge(self.streams):
                self._count(delta)
                deltas[i].append(delta)
        choices = []
        for choice, own in zip(self.choices, deltas):
            output = Delta.join(own)
            # a long prompt's log-probabilities take a tenth of a second, for which streams must not wait
            choices.append(await asyncio.to_thread(choice.whole, output) if self._scores_prompts else choice.whole(output))
        rest = {}
        if self.body.prompt_logprobs is not None and isinstance(self.body, ChatRequest):
            rest["prompt_logprobs"] = prompt_logprobs(self.streams[0])
        return self.head.whole(choices, usage=self._final_usage(), **rest)

    @property
    def _scores_prompts(self) -> bool:
        return any(stream.request is not None and bool(stream.request.prompt_logprobs) for stream in self.streams)

    def _count(self, delta: Delta) -> None:
        if not self.body.prompt_only:
            self.completion_tokens += len(delta.token_ids)

    # -- events of a stream ---------------------------------------------------------------------------------------------

    def opening_events(self) -> list[JsonObject]:
        return [self.head.event(opening) for choice in self.choices if (opening := choice.opening()) is not None]

    def events(self, i: int, delta: Delta) -> list[JsonObject]:
        """Events for new output of choice `i`."""
        self._count(delta)
        part = self.choices[i].part(delta)
        if part is None:
            return []
        options = self.body.stream_options
        wants_usage = options is not None and options.continuous_usage_stats
        return [self.head.event(part, **({"usage": self._usage()} if wants_usage else {}))]

    def closing_events(self) -> list[JsonObject]:
        usage, options = self._final_usage(), self.body.stream_options
        return [self.head.event(usage=usage)] if options is not None and options.include_usage else []

    def _usage(self) -> dict[str, int]:
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _final_usage(self) -> dict[str, int]:
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        self.request.state.log.update(model=self.head.model, **counts)
        return self._usage()


class EventStream(Response):
    """Server-sent events of an answer."""

    def __init__(self, answer: Answer):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await run_while_connected(receive, self._write(send))
        finally:
            self._answer.close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def write(events: list[JsonObject], end: bytes = b"") -> None:
            body = b"".join([b"data: %b\n\n" % json.dumps(event).encode() for event in events]) + end
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": not end})

        done = b"data: [DONE]\n\n"
        try:
            await write(self._answer.opening_events())
            async with contextlib.aclosing(merge(self._answer.streams)) as deltas:
                async for i, delta in deltas:
                    await write(self._answer.events(i, delta))
            await write(self._answer.closing_events(), done)
        except ServingError as error:  # the status 200 is sent already
            await write([api_error(error).body], done)
