"""What clients may ask: OpenAI's fields, and vLLM's where they mean something here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictInt

from chameleon_jax.sampling_params import MAX_STOP_IDS, MAX_STOPS, SamplingParams
from chameleon_jax.serving.http.body import EMPTY, Body, only
from chameleon_jax.serving.http.errors import ApiError
from chameleon_jax.serving.http.messages import Message

Number = Annotated[float, Field(allow_inf_nan=False)]
MAX_PROMPTS = 64
MAX_MESSAGES = 2048

TokenIds = Annotated[list[StrictInt], Field(min_length=1, fail_fast=True)]
"""All lists fail at their first error, as `Body` does: there may be a million, and to find them all takes seconds."""


class StreamOptions(Body):
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = Field(default=False, description="Usage so far in every event, as in vLLM.")
    include_obfuscation: StrictBool = Field(default=False, description="Taken, and not used.")


class Sampling(Body):
    """Fields of both kinds of completions."""

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
    include_stop_str_in_output: StrictBool | None = None
    min_tokens: StrictInt | None = None
    ignore_eos: StrictBool = False
    skip_special_tokens: StrictBool = True
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None

    # taken and not used: they change no answer
    user: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    cache_salt: Any = None
    session_id: Any = None

    # not supported: only values that change nothing are taken
    best_of: Any = Field(default=None, description="Only the value of n.")
    store: Annotated[Any, only(False)] = None
    presence_penalty: Annotated[Any, only(0)] = None
    frequency_penalty: Annotated[Any, only(0)] = None
    repetition_penalty: Annotated[Any, only(1)] = None
    length_penalty: Annotated[Any, only(1)] = None
    use_beam_search: Annotated[Any, only(False)] = None
    logit_bias: Annotated[Any, only(*EMPTY)] = None
    logits_processors: Annotated[Any, only(*EMPTY)] = None
    allowed_token_ids: Annotated[Any, only(*EMPTY)] = None
    bad_words: Annotated[Any, only(*EMPTY)] = None
    response_format: Annotated[Any, only({"type": "text"}, *EMPTY)] = None
    structured_outputs: Annotated[Any, only(*EMPTY)] = None
    structural_tag: Annotated[Any, only(*EMPTY)] = None
    guided_json: Annotated[Any, only("")] = None
    guided_regex: Annotated[Any, only(*EMPTY)] = None
    guided_choice: Annotated[Any, only(*EMPTY)] = None
    guided_grammar: Annotated[Any, only(*EMPTY)] = None
    guided_decoding_backend: Annotated[Any, only(*EMPTY)] = None
    guided_whitespace_pattern: Annotated[Any, only(*EMPTY)] = None
    spaces_between_special_tokens: Annotated[Any, only(True)] = None
    detokenize: Annotated[Any, only(True)] = None
    truncate_prompt_tokens: Annotated[Any, only()] = None
    truncation_side: Annotated[Any, only("left", "right", "")] = None
    prompt_logprobs: Annotated[Any, only()] = None
    logprob_token_ids: Annotated[Any, only(*EMPTY)] = None
    return_token_ids: Annotated[Any, only(False)] = None
    return_tokens_as_token_ids: Annotated[Any, only(False)] = None
    thinking_token_budget: Annotated[Any, only(-1)] = None
    priority: Annotated[Any, only(0)] = None
    request_id: Annotated[Any, only("")] = None
    kv_transfer_params: Annotated[Any, only(*EMPTY)] = None
    vllm_xargs: Annotated[Any, only(*EMPTY)] = None

    def check_together(self) -> None:
        """Raises ApiError where fields do not go together."""
        if self.best_of not in (None, self.n or 1):
            raise ApiError(400, f"best_of is {self.best_of!r:.40}; it is not supported, allowed: null or n", param="best_of")
        asked = [name for name, value in self.stream_options or () if value]
        if asked and not self.stream:
            raise ApiError(400, f"stream_options has {asked[0]}; allowed: only together with stream", param="stream_options")

    def sampling_params(
        self, max_tokens: int | None, logprobs: int | None, max_choices: int, defaults: Mapping[str, Any]
    ) -> list[SamplingParams]:
        """One for each of `n`. Raises ValueError or ApiError.

        Args:
            defaults: values of the fields that are left out.
        """
        self.check_together()
        n = self.n or 1
        if n > max_choices:
            raise ApiError(400, f"n is {n}; allowed: 1 to {max_choices}", param="n")
        fields: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "min_tokens": self.min_tokens,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "include_stop_str_in_output": self.include_stop_str_in_output,
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


def _none_of_false(value: Any) -> Any:
    return None if value is False else value


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
    logprobs: Annotated[Annotated[StrictInt, Field(ge=0, le=20)] | None, BeforeValidator(_none_of_false)] = None
    echo: StrictBool | None = False

    suffix: Annotated[Any, only(*EMPTY)] = None
    prompt_embeds: Annotated[Any, only(*EMPTY)] = None
    add_special_tokens: Annotated[Any, only(True)] = None

    def check_together(self) -> None:
        super().check_together()
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "echo is set; allowed: not together with logprobs", param="echo")

    def prompts(self) -> Sequence[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return prompt


_TEMPLATE_FIELDS = {"messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"}


def _variables(given: dict[str, Any]) -> dict[str, Any]:
    if fields := sorted(given.keys() & _TEMPLATE_FIELDS):
        raise ValueError(f"allowed: not {fields[0]}, which is a field of the request")
    return given


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: StrictInt | None = None
    max_completion_tokens: StrictInt | None = Field(
        default=None, description="Left out: the model's default, within the context."
    )
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = Field(
        default=False, description="Go on with the last message; only with add_generation_prompt false."
    )
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_variables)] = Field(
        default_factory=dict, description="More variables of the chat template."
    )

    include_reasoning: Annotated[Any, only(True, False)] = None  # there is no such text beside the content
    reasoning_effort: Annotated[Any, only("none", "")] = None
    verbosity: Annotated[Any, only("medium", "")] = None
    tools: Annotated[Any, only(*EMPTY)] = None
    tool_choice: Annotated[Any, only("none", *EMPTY)] = None
    functions: Annotated[Any, only(*EMPTY)] = None
    function_call: Annotated[Any, only("none", *EMPTY)] = None
    parallel_tool_calls: Annotated[Any, only(True, False)] = None
    modalities: Annotated[Any, only(["text"], *EMPTY)] = None
    audio: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None  # an empty one asks for a search
    documents: Annotated[Any, only(*EMPTY)] = None
    chat_template: Annotated[Any, only(*EMPTY)] = None
    mm_processor_kwargs: Annotated[Any, only(*EMPTY)] = None
    echo: Annotated[Any, only(False)] = None
    add_special_tokens: Annotated[Any, only(False)] = None  # as in vLLM: the template has them

    def check_together(self) -> None:
        super().check_together()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs is set; allowed: only together with logprobs", param="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            message = "continue_final_message is set; allowed: only with add_generation_prompt false"
            raise ApiError(400, message, param="continue_final_message")

    def template_variables(self) -> dict[str, Any]:
        fields = {"add_generation_prompt": self.add_generation_prompt, "continue_final_message": self.continue_final_message}
        return self.chat_template_kwargs | fields
