"""Requests for completions: OpenAI's fields, and the fields of vLLM that apply here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import Request
from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictInt

from chameleon_jax.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_MIXED_LORAS,
    MAX_STOP_IDS,
    MAX_STOPS,
    SamplingParams,
)
from chameleon_jax.serving.http.errors import ApiError
from chameleon_jax.serving.http.strict_model import ACCEPTED_VALUES, NullIfEmpty, StrictModel, Unsupported, reject_unsupported
from chameleon_jax.serving.http.structured import Structured
from chameleon_jax.serving.http.template_fields import Messages, TemplateFields
from chameleon_jax.serving.http.tool_definitions import check_tool_choice
from chameleon_jax.serving.service.service import MAX_NAME_LEN
from chameleon_jax.serving.tools.call_parser import CallParser
from chameleon_jax.serving.tools.tool_choice import ToolChoice

Number = Annotated[float, Field(allow_inf_nan=False)]
NumLogprobs = Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)]
MAX_PROMPTS = 64
MAX_ALLOWED_IDS = 1 << 16


def _check_num_biases(biases: Any) -> Any:
    """Raise ValueError where there are too many, before each is looked at."""
    if isinstance(biases, dict) and len(biases) > MAX_LOGIT_BIAS:
        raise ValueError(f"allowed: at most {MAX_LOGIT_BIAS} tokens")
    return biases


Biases = Annotated[dict[str, Number], BeforeValidator(_check_num_biases)]
AllowedIds = Annotated[list[StrictInt], Field(max_length=MAX_ALLOWED_IDS, fail_fast=True)]
TokenIds = Annotated[list[StrictInt], Field(min_length=1, fail_fast=True)]
"""Every list here fails at its first error: a body may hold a million, and to find them all takes seconds."""


_DEFAULTED = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
    *("allowed_token_ids", "min_tokens", "stop", "stop_token_ids", "include_stop_str_in_output"),
)
"""Fields with a default: the server's, else the one of `SamplingParams`."""


class LoRAWeight(StrictModel):
    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME_LEN)]
    weight: Number = 1.0


class StreamOptions(StrictModel):
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = Field(default=False, description="Send the usage so far with every event, as in vLLM.")
    include_obfuscation: StrictBool = Field(default=False, description="Accepted and ignored.")


class Sampling(Structured):
    """Fields that both kinds of completions share."""

    model: Annotated[str, Field(max_length=MAX_NAME_LEN)] | None = Field(
        default=None, description="Base model or adapter. Default: the base model."
    )
    lora: Annotated[list[LoRAWeight], Field(min_length=1, max_length=MAX_MIXED_LORAS, fail_fast=True)] | None = Field(
        default=None, description="Adapters whose weighted sum answers. Allowed with the base model as `model`."
    )
    temperature: Number | None = Field(default=None, description="Default, here and below: the model's own setting.")
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: Annotated[Biases | None, NullIfEmpty] = None
    allowed_token_ids: Annotated[AllowedIds | None, NullIfEmpty] = None
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
    prompt_logprobs: NumLogprobs | None = None

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
    length_penalty: Annotated[Any, reject_unsupported(1)] = None
    use_beam_search: Annotated[Any, reject_unsupported(False)] = None
    logits_processors: Unsupported = None
    bad_words: Unsupported = None
    structural_tag: Unsupported = None
    guided_decoding_backend: Unsupported = None
    spaces_between_special_tokens: Annotated[Any, reject_unsupported(True)] = None
    detokenize: Annotated[Any, reject_unsupported(True)] = None
    truncate_prompt_tokens: Annotated[Any, reject_unsupported()] = None
    truncation_side: Annotated[Any, reject_unsupported("left", "right", "")] = None
    logprob_token_ids: Unsupported = None
    return_token_ids: Annotated[Any, reject_unsupported(False)] = None
    return_tokens_as_token_ids: Annotated[Any, reject_unsupported(False)] = None
    thinking_token_budget: Annotated[Any, reject_unsupported(-1)] = None
    request_id: Annotated[Any, reject_unsupported("")] = None
    kv_transfer_params: Unsupported = None
    vllm_xargs: Unsupported = None

    @property
    def prompt_only(self) -> bool:
        """Whether the answer is the prompt alone."""
        return False

    def own_names(self) -> dict[str, str]:
        """Names that the request has for the engine's fields."""
        return {name: name for name in type(self).model_fields} | {"loras": "lora", "weights": "lora"}

    def mixed_loras(self) -> list[tuple[str, float]]:
        """Names and weights of `lora`; empty without."""
        return [(lora.name, lora.weight) for lora in self.lora or ()]

    def check_combinations(self) -> None:
        """Raise ApiError for fields that exclude each other."""
        if self.best_of not in (None, self.n or 1):
            raise ApiError(400, f"best_of is {self.best_of!r:.40}; it is not supported, allowed: null or n", param="best_of")
        asked = [name for name, value in self.stream_options or () if value]
        if asked and not self.stream:
            raise ApiError(400, f"stream_options has {asked[0]}; allowed: only together with stream", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise ApiError(400, "prompt_logprobs is set; allowed: not together with stream", param="prompt_logprobs")

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
        if self.logit_bias is not None:
            fields["logit_bias"] = _by_token_id(self.logit_bias)
        language = self.language()
        given = {**defaults, **{name: value for name, value in fields.items() if value is not None}}
        first = SamplingParams(
            **given,
            seed=self.seed,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
            structured_outputs=language,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
        )
        seeds = [None if self.seed is None else _choice_seed(self.seed, i) for i in range(n)]
        return [dataclasses.replace(first, seed=seed) for seed in seeds]


def _by_token_id(biases: Mapping[str, float]) -> dict[int, float]:
    """Convert the keys of `logit_bias`, which JSON has as texts. Raises ApiError."""
    wrong = next((key for key in biases if not (key.isascii() and key.isdigit() and len(key) < 10)), None)
    if wrong is not None:
        raise ApiError(400, f"logit_bias has the key {wrong[:40]!r}; allowed: token ids", param="logit_bias")
    return {int(key): value for key, value in biases.items()}


def _choice_seed(seed: int, i: int) -> int:
    """Seed of choice `i`, wrapped to 64 bits."""
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

    @property
    def prompt_only(self) -> bool:
        return bool(self.echo) and self.max_tokens == 0

    def sampling_params(
        self, max_tokens: int | None, logprobs: int | None, max_choices: int, defaults: Mapping[str, Any]
    ) -> list[SamplingParams]:
        """Make the parameters as `Sampling` does. The token that `prompt_only` needs to run is left out of the answer."""
        params = super().sampling_params(1 if self.prompt_only else max_tokens, logprobs, max_choices, defaults)
        if self.echo and logprobs is not None and self.prompt_logprobs is None:
            params = [dataclasses.replace(p, prompt_logprobs=logprobs) for p in params]
        return params

    def prompts(self) -> Sequence[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return prompt


class ChatRequest(TemplateFields, Sampling):
    messages: Messages
    max_tokens: StrictInt | None = None
    max_completion_tokens: StrictInt | None = Field(
        default=None, description="Default: the model's own setting, else the whole context."
    )
    logprobs: StrictBool | None = False
    top_logprobs: NumLogprobs | None = None
    tool_choice: Annotated[Any, AfterValidator(check_tool_choice), NullIfEmpty] = Field(
        default=None, description="Default: auto where there are tools. With none, the chat template sees no tools."
    )
    parallel_tool_calls: StrictBool | None = Field(default=True, description="False keeps the first call only.")

    include_reasoning: Annotated[Any, reject_unsupported(True, False)] = None  # no model here returns reasoning apart
    verbosity: Annotated[Any, reject_unsupported("medium", "")] = None
    functions: Unsupported = None
    function_call: Annotated[Any, reject_unsupported("none", *ACCEPTED_VALUES)] = None
    modalities: Annotated[Any, reject_unsupported(["text"], *ACCEPTED_VALUES)] = None
    audio: Annotated[Any, reject_unsupported()] = None
    moderation: Annotated[Any, reject_unsupported()] = None
    prediction: Annotated[Any, reject_unsupported()] = None
    web_search_options: Annotated[Any, reject_unsupported()] = None  # an empty object would ask for a search
    mm_processor_kwargs: Unsupported = None
    echo: Annotated[Any, reject_unsupported(False)] = None
    add_special_tokens: Annotated[Any, reject_unsupported(False)] = None  # as in vLLM, the chat template adds them

    def check_combinations(self) -> None:
        super().check_combinations()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs is set; allowed: only together with logprobs", param="top_logprobs")
        self.check_template_fields()
        names = [tool.function.name for tool in self.tools or ()]
        if self.tool_choice not in (None, "none") and not names:
            raise ApiError(400, f"tool_choice is {self.tool_choice!r:.200}; allowed: only together with tools", "tool_choice")
        if isinstance(self.tool_choice, dict) and (name := self.tool_choice["function"]["name"]) not in names:
            raise ApiError(400, f"tool_choice is {name!r:.200}; allowed: a tool of tools: {', '.join(names)}", "tool_choice")

    def own_names(self) -> dict[str, str]:
        most = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return super().own_names() | {"prompt": "messages", "max_tokens": most}

    def template_variables(self) -> dict[str, Any]:
        variables = super().template_variables()
        if self.tool_choice == "none":
            variables.pop("tools", None)
        return variables

    def chosen_tools(self, style: type[CallParser]) -> ToolChoice | None:
        """Tools that the answer may call; None for an answer without calls. Args: style: of the model."""
        if not self.tools or self.tool_choice == "none":
            return None
        tools = [definition.tool for definition in self.tools]
        parallel = self.parallel_tool_calls is not False
        if isinstance(self.tool_choice, dict):
            name = self.tool_choice["function"]["name"]
            return ToolChoice(style, [tool for tool in tools if tool.name == name][:1], "named", parallel)
        return ToolChoice(style, tools, self.tool_choice or "auto", parallel)


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
