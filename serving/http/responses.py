"""Schemas of answers, for the OpenAPI document only: answers are plain dicts, as one is built for every token."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "abort", "tool_calls"]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptAlternative(BaseModel):
    logprob: float
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptAlternative] | None]
"""Alternatives of each token of a prompt by id, the token itself first; null at the first token."""


class Choice(BaseModel):
    """Fields of a choice of either kind of answer."""

    index: int
    finish_reason: FinishReason
    stop_reason: str | int | None = None


class Answer(BaseModel):
    """Fields of either kind of answer."""

    id: str
    created: int
    model: str
    usage: Usage


class CompletionChoice(Choice):
    """Choice of a completion. `stop_reason` is the stop string or token id that ended it."""

    text: str
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatAnswer(BaseModel):
    """Message of a choice. `content` may be null only beside `tool_calls`."""

    role: str
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] = []


class ChatChoice(Choice):
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_logprobs: PromptLogprobs | None = None
