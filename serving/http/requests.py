"""What clients may ask: OpenAI's fields, and vLLM's where they mean something here."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, model_validator
from pydantic_core import PydanticCustomError

from chameleon_jax.request import MAX_STOP_IDS, MAX_STOPS, SamplingParams
from chameleon_jax.serving.http.errors import ApiError

Number = Annotated[float, Field(allow_inf_nan=False)]
MAX_PROMPTS = 64
MAX_MESSAGES = 2048
MAX_PARTS = 1024

TokenIds = Annotated[list[StrictInt], Field(min_length=1, fail_fast=True)]
"""All lists fail at their first error, as `Body` does: there may be a million, and to find them all takes seconds."""


class Body(BaseModel):
    """An object of which every field is known."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        unknown = next((name for name in data if name not in cls.model_fields), None) if isinstance(data, dict) else None
        if unknown is not None:
            raise PydanticCustomError(
                "extra_forbidden", "unknown field", {"field": unknown[:200].encode(errors="replace").decode()}
            )
        return data


class StreamOptions(Body):
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = Field(default=False, description="Usage so far in every event, as in vLLM.")


class Sampling(Body):
    """Fields of both kinds of completions.

    Those that are typed `Any` would change the answer and are not supported: values that change nothing are taken (see
    `check_neutral`). The five after `stream_options` are taken and not used.
    """

    model: Annotated[str, Field(max_length=256)] | None = Field(
        default=None, description="The base model or an adapter; left out: the base model."
    )
    temperature: Number | None = Field(default=None, description="Left out, as others: the model's default.")
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    seed: StrictInt | None = None
    n: Annotated[StrictInt, Field(ge=1)] | None = None
    stop: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[StrictInt], Field(max_length=MAX_STOP_IDS, fail_fast=True)] | None = None
    min_tokens: StrictInt | None = None
    ignore_eos: StrictBool = False
    skip_special_tokens: StrictBool = True
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None

    user: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    store: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    logit_bias: Any = None
    response_format: Any = None
    include_stop_str_in_output: Any = None
    spaces_between_special_tokens: Any = None

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "store": (False,),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "repetition_penalty": (1,),
        "logit_bias": ({},),
        "response_format": ({"type": "text"},),
        "include_stop_str_in_output": (False,),
        "spaces_between_special_tokens": (True,),
    }

    def check_neutral(self) -> None:
        """Raises ApiError where a field that is not supported would change the answer."""
        for field, values in self.NEUTRAL.items():
            value = getattr(self, field)
            if value is not None and value not in values:
                allowed = " or ".join(["null", *map(repr, values)])
                raise ApiError(400, f"{field} is {reprlib.repr(value)}; it is not supported, allowed: {allowed}", param=field)

    def sampling_params(
        self, max_tokens: int | None, logprobs: int | None, max_choices: int, defaults: Mapping[str, Any]
    ) -> list[SamplingParams]:
        """One for each of `n`. Raises ValueError or ApiError.

        Args:
            defaults: values of the fields that are left out.
        """
        self.check_neutral()
        n = self.n or 1
        if n > max_choices:
            raise ApiError(400, f"n is {n}; allowed: 1 to {max_choices}", param="n")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is set; allowed: only together with stream", param="stream_options")
        fields: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "min_tokens": self.min_tokens,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "max_tokens": max_tokens,
        }
        given = {**defaults, **{name: value for name, value in fields.items() if value is not None}}
        return [
            SamplingParams(
                **given,
                seed=None if self.seed is None else _wrapped(self.seed, i),
                logprobs=logprobs,
                ignore_eos=self.ignore_eos,
                skip_special_tokens=self.skip_special_tokens,
            )
            for i in range(n)
        ]


def _wrapped(seed: int, i: int) -> int:
    """The seed of choice i: the first is the one that was given. Of what is no 64-bit integer `SamplingParams` complains."""
    return seed + i if i == 0 or not -(2**63) <= seed < 2**63 else (seed + i + 2**63) % 2**64 - 2**63


class CompletionRequest(Sampling):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: StrictInt | None = Field(
        default=None, description="Left out: the model's default, else 16, within the context."
    )
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: StrictBool | None = False

    suffix: Any = None
    best_of: Any = None
    use_beam_search: Any = None
    length_penalty: Any = None
    add_special_tokens: Any = None

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = Sampling.NEUTRAL | {
        "suffix": ("",),
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "add_special_tokens": (True,),
    }

    def check_neutral(self) -> None:
        super().check_neutral()
        if self.best_of not in (None, self.n or 1):
            best_of = reprlib.repr(self.best_of)
            raise ApiError(400, f"best_of is {best_of}; it is not supported, allowed: null or n", param="best_of")
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "echo is set; allowed: not together with logprobs", param="echo")

    def prompts(self) -> Sequence[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return prompt


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None

    def for_template(self) -> dict[str, str]:
        """What chat templates know. Raises ApiError where the message is more than text."""
        for field in ("tool_calls", "function_call", "audio"):
            if getattr(self, field):
                raise ApiError(400, f"messages: {field} is set; it is not supported, allowed: text", param=f"messages.{field}")
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: StrictInt | None = None
    max_completion_tokens: StrictInt | None = Field(
        default=None, description="Left out: the model's default, within the context."
    )
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None

    reasoning_effort: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    parallel_tool_calls: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    echo: Any = None
    add_generation_prompt: Any = None
    add_special_tokens: Any = None

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = Sampling.NEUTRAL | {
        "reasoning_effort": ("none",),
        "tools": ([],),
        "tool_choice": ("none",),
        "functions": ([],),
        "function_call": ("none",),
        "parallel_tool_calls": (True, False),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "echo": (False,),
        "add_generation_prompt": (True,),
        "add_special_tokens": (False,),  # as in vLLM: the template has them
    }

    def check_neutral(self) -> None:
        super().check_neutral()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs is set; allowed: only together with logprobs", param="top_logprobs")
