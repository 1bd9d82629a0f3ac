"""Requests for completions: OpenAI's fields, and the fields of vLLM that apply here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import Request
from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictInt

from chameleon_jax.sampling_params import MAX_LOGPROBS, MAX_STOP_IDS, MAX_STOPS, SamplingParams
from chameleon_jax.serving.http.errors import ApiError
from chameleon_jax.serving.http.messages import Message
from chameleon_jax.serving.http.strict_model import ACCEPTED_VALUES, StrictModel, Unsupported, reject_unsupported
from chameleon_jax.serving.service.service import MAX_NAME_LEN

Number = Annotated[float, Field(allow_inf_nan=False)]
NumLogprobs = Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)]
MAX_PROMPTS = 64
MAX_MESSAGES = 2048

TokenIds = Annotated[list[StrictInt], Field(min_length=1, fail_fast=True)]
"""Every list here fails at its first error: a body may hold a million, and to find them all takes seconds."""


_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "min_tokens", "stop", "stop_token_ids", "include_stop_str_in_output")
"""Fields with a default: the server's, else the one of `SamplingParams`."""


class StreamOptions(StrictModel):
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = Field(default=False, description="Send the usage so far with every event, as in vLLM.")
    include_obfuscation: StrictBool = Field(default=False, description="Accepted and ignored.")


class Sampling(StrictModel):
    """Fields that both kinds of completions share."""

    model: Annotated[str, Field(max_length=MAX_NAME_LEN)] | None = Field(
        default=None, description="Base model or adapter. Default: the base model."
    )
    temperature: Number | None = Field(default=None, description="Default, here and below: the model's own setting.")
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    seed: StrictInt | None = None
    n: Annotated[StrictInt, Field(ge=1)] | None = None
    stop: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[StrictInt], Field(max_length=MAX_STOP_IDS, fail_fast=True)] | None = None
    include_stop_str_in_output: StrictBool | None = None
    min_tokens: StrictInt | None = None
    ignore_eos: StrictBool = False
    priority: Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)] = Field(
        default=0, description="Class, as in vLLM. Lower ones start first."
    )
    skip_special_tokens: StrictBool = True
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None

    # accepted and ignored: they change no answer
    user: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    cache_salt: Any = None
    session_id: Any = None

    # not supported: only values that change nothing are accepted
    best_of: Any = Field(default=None, description="Accepted only if equal to n.")
    store: Annotated[Any, reject_unsupported(False)] = None
    presence_penalty: Annotated[Any, reject_unsupported(0)] = None
    frequency_penalty: Annotated[Any, reject_unsupported(0)] = None
    repetition_penalty: Annotated[Any, reject_unsupported(1)] = None
    length_penalty: Annotated[Any, reject_unsupported(1)] = None
    use_beam_search: Annotated[Any, reject_unsupported(False)] = None
    logit_bias: Unsupported = None
    logits_processors: Unsupported = None
    allowed_token_ids: Unsupported = None
    bad_words: Unsupported = None
    response_format: Annotated[Any, reject_unsupported({"type": "text"}, *ACCEPTED_VALUES)] = None
    structured_outputs: Unsupported = None
    structural_tag: Unsupported = None
    guided_json: Annotated[Any, reject_unsupported("")] = None
    guided_regex: Unsupported = None
    guided_choice: Unsupported = None
    guided_grammar: Unsupported = None
    guided_decoding_backend: Unsupported = None
    guided_whitespace_pattern: Unsupported = None
    spaces_between_special_tokens: Annotated[Any, reject_unsupported(True)] = None
    detokenize: Annotated[Any, reject_unsupported(True)] = None
    truncate_prompt_tokens: Annotated[Any, reject_unsupported()] = None
    truncation_side: Annotated[Any, reject_unsupported("left", "right", "")] = None
    prompt_logprobs: Annotated[Any, reject_unsupported()] = None
    logprob_token_ids: Unsupported = None
    return_token_ids: Annotated[Any, reject_unsupported(False)] = None
    return_tokens_as_token_ids: Annotated[Any, reject_unsupported(False)] = None
    thinking_token_budget: Annotated[Any, reject_unsupported(-1)] = None
    request_id: Annotated[Any, reject_unsupported("")] = None
    kv_transfer_params: Unsupported = None
    vllm_xargs: Unsupported = None

    def check_combinations(self) -> None:
        """Raise ApiError for fields that exclude each other."""
        if self.best_of not in (None, self.n or 1):
            raise ApiError(400, f"best_of is {self.best_of!r:.40}; it is not supported, allowed: null or n", param="best_of")
        asked = [name for name, value in self.stream_options or () if value]
        if asked and not self.stream:
            raise ApiError(400, f"stream_options has {asked[0]}; allowed: only together with stream", param="stream_options")

    def sampling_params(
        self, max_tokens: int | None, logprobs: int | None, max_choices: int, defaults: Mapping[str, Any]
    ) -> list[SamplingParams]:
        """Make the parameters of each of the `n` choices.

        Args:
            max_tokens: Most output tokens. None takes the default.
            logprobs: Alternatives to report at each token. None reports none.
            max_choices: Largest `n` allowed.
            defaults: Values of fields that the request leaves out.

        Raises:
            ValueError, ApiError: A field is out of range, or excludes another.
        """
        self.check_combinations()
        n = self.n or 1
        if n > max_choices:
            raise ApiError(400, f"n is {n}; allowed: 1 to {max_choices}", param="n")
        fields: dict[str, Any] = {name: getattr(self, name) for name in _DEFAULTED} | {"max_tokens": max_tokens}
        given = {**defaults, **{name: value for name, value in fields.items() if value is not None}}
        return [
            SamplingParams(
                **given,
                seed=None if self.seed is None else _choice_seed(self.seed, i),
                logprobs=logprobs,
                ignore_eos=self.ignore_eos,
                skip_special_tokens=self.skip_special_tokens,
            )
            for i in range(n)
        ]


def _choice_seed(seed: int, i: int) -> int:
    """Seed of choice `i`, wrapped to 64 bits. A given seed outside of 64 bits is left for `SamplingParams` to refuse."""
    return seed + i if i == 0 or not -(2**63) <= seed < 2**63 else (seed + i + 2**63) % 2**64 - 2**63


def _false_as_null(value: Any) -> Any:
    return None if value is False else value


class CompletionRequest(Sampling):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: StrictInt | None = Field(
        default=None, description="Default: the model's own setting, else 16, within the context."
    )
    logprobs: Annotated[NumLogprobs | None, BeforeValidator(_false_as_null)] = None
    echo: StrictBool | None = False

    suffix: Unsupported = None
    prompt_embeds: Unsupported = None
    add_special_tokens: Annotated[Any, reject_unsupported(True)] = None

    def check_combinations(self) -> None:
        super().check_combinations()
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "echo is set; allowed: not together with logprobs", param="echo")

    def prompts(self) -> Sequence[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return prompt


_TEMPLATE_FIELDS = {"messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"}


def _refuse_template_fields(given: dict[str, Any]) -> dict[str, Any]:
    if fields := sorted(given.keys() & _TEMPLATE_FIELDS):
        raise ValueError(f"allowed: not {fields[0]}, which is a field of the request")
    return given


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: StrictInt | None = None
    max_completion_tokens: StrictInt | None = Field(
        default=None, description="Default: the model's own setting, else the whole context."
    )
    logprobs: StrictBool | None = False
    top_logprobs: NumLogprobs | None = None
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = Field(
        default=False, description="Continue the last message. Requires add_generation_prompt to be false."
    )
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_refuse_template_fields)] = Field(
        default_factory=dict, description="Further variables for the chat template."
    )

    include_reasoning: Annotated[Any, reject_unsupported(True, False)] = None  # no model here returns reasoning apart
    reasoning_effort: Annotated[Any, reject_unsupported("none", "")] = None
    verbosity: Annotated[Any, reject_unsupported("medium", "")] = None
    tools: Unsupported = None
    tool_choice: Annotated[Any, reject_unsupported("none", *ACCEPTED_VALUES)] = None
    functions: Unsupported = None
    function_call: Annotated[Any, reject_unsupported("none", *ACCEPTED_VALUES)] = None
    parallel_tool_calls: Annotated[Any, reject_unsupported(True, False)] = None
    modalities: Annotated[Any, reject_unsupported(["text"], *ACCEPTED_VALUES)] = None
    audio: Annotated[Any, reject_unsupported()] = None
    moderation: Annotated[Any, reject_unsupported()] = None
    prediction: Annotated[Any, reject_unsupported()] = None
    web_search_options: Annotated[Any, reject_unsupported()] = None  # an empty object would ask for a search
    documents: Unsupported = None
    chat_template: Unsupported = None
    mm_processor_kwargs: Unsupported = None
    echo: Annotated[Any, reject_unsupported(False)] = None
    add_special_tokens: Annotated[Any, reject_unsupported(False)] = None  # as in vLLM, the chat template adds them

    def check_combinations(self) -> None:
        super().check_combinations()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs is set; allowed: only together with logprobs", param="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            message = "continue_final_message is set; allowed: only with add_generation_prompt false"
            raise ApiError(400, message, param="continue_final_message")

    def template_variables(self) -> dict[str, Any]:
        fields = {"add_generation_prompt": self.add_generation_prompt, "continue_final_message": self.continue_final_message}
        return self.chat_template_kwargs | fields


def timeout_of(request: Request) -> float | None:
    """Seconds in the header `X-Request-Timeout`, None without one. Raises ApiError where it is invalid."""
    header = request.headers.get("x-request-timeout")
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        name = "x-request-timeout"
        raise ApiError(400, f"{name} is {header[:40]!r}; allowed: above 0 seconds, finite", param=name)
    return seconds
