"""Fields of requests: accepted, refused by name, or wrong in many places, of which only the first is reported."""

from __future__ import annotations

import typing
from typing import Any

import openai.types.chat.completion_create_params
import openai.types.completion_create_params
import pytest
from pydantic import ValidationError

from chameleon_jax.sampling_params import MAX_STOP_IDS
from chameleon_jax.serving.http.errors import ApiError
from chameleon_jax.serving.http.messages import MAX_PARTS, Message, Part
from chameleon_jax.serving.http.models import LoadLora, UnloadLora
from chameleon_jax.serving.http.requests import MAX_MESSAGES, ChatRequest, CompletionRequest, StreamOptions

MANY = 5000
UNKNOWN = {f"k{i}": 1 for i in range(MANY)}
MESSAGE = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [None] * MANY}),
        (CompletionRequest, {"prompt": [[None] * MANY] * 60}),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": [None] * MANY}),
        (CompletionRequest, {"prompt": "x", "stop": [None] * MANY}),
        (CompletionRequest, {"prompt": "x"} | UNKNOWN),
        (ChatRequest, {"messages": [{}] * MANY}),
        (ChatRequest, {"messages": [MESSAGE | UNKNOWN]}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"} | UNKNOWN]}]}),
        (ChatRequest, {"messages": [MESSAGE], "stream_options": UNKNOWN}),
        (LoadLora, UNKNOWN),
    ],
)
def test_many_errors(kind, body):
    with pytest.raises(ValidationError) as error:
        kind.model_validate(body)
    assert error.value.error_count() <= 4  # one for each type that a field may have


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"messages": [MESSAGE] * (MAX_MESSAGES + 1)}, MAX_MESSAGES),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * (MAX_PARTS + 1)}]}, MAX_PARTS),
        ({"messages": [MESSAGE], "stop_token_ids": [1] * (MAX_STOP_IDS + 1)}, MAX_STOP_IDS),
    ],
)
def test_lists_that_are_too_long(fields, most):
    with pytest.raises(ValidationError, match=f"at most {most} items"):
        ChatRequest.model_validate(fields)


def fields_of(params: Any) -> set[str]:
    return set(typing.get_type_hints(params))


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        (openai.types.chat.completion_create_params.CompletionCreateParamsStreaming, ChatRequest),
        (openai.types.chat.completion_create_params.CompletionCreateParamsNonStreaming, ChatRequest),
        (openai.types.completion_create_params.CompletionCreateParamsStreaming, CompletionRequest),
        (openai.types.completion_create_params.CompletionCreateParamsNonStreaming, CompletionRequest),
        (openai.types.chat.ChatCompletionStreamOptionsParam, StreamOptions),
        (openai.types.chat.ChatCompletionContentPartTextParam, Part),
        (openai.types.chat.ChatCompletionContentPartRefusalParam, Part),
        *[(params, Message) for params in typing.get_args(openai.types.chat.ChatCompletionMessageParam)],
    ],
)
def test_every_field_of_openais_clients_is_known(params, kind):
    assert fields_of(params) <= set(kind.model_fields)


REQUIRED = {"messages": [MESSAGE], "prompt": "x", "role": "user", "type": "text", "text": "x"}


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, StreamOptions, Message, Part, LoadLora, UnloadLora])
def test_null_fields_count_as_left_out(kind):
    needed = {name: REQUIRED.get(name, "x") for name, field in kind.model_fields.items() if field.is_required()}
    needed |= {"text": "x"} if kind is Part else {}
    plain = kind.model_validate(needed)
    nulls = dict.fromkeys([*kind.model_fields, "nonsense", *openai.types.chat.ChatCompletionMessage.model_fields])
    assert kind.model_validate(nulls | needed).model_dump() == plain.model_dump()


NOTHING = [
    *[
        (field, empty)
        for field in ("logit_bias", "response_format", "guided_regex", "bad_words")
        for empty in (False, "", [], {})
    ],
    ("best_of", 1),
    ("bad_words", []),
    ("allowed_token_ids", []),
    ("cache_salt", "salt"),
    ("detokenize", True),
    ("frequency_penalty", 0.0),
    ("guided_choice", []),
    ("guided_json", ""),
    ("ignore_eos", False),
    ("kv_transfer_params", {}),
    ("length_penalty", 1.0),
    ("logit_bias", {}),
    ("logits_processors", []),
    ("logprobs", False),
    ("metadata", {"a": "b"}),
    ("min_p", 0.0),
    ("n", 1),
    ("presence_penalty", 0),
    ("priority", 0),
    ("prompt_cache_key", ""),
    ("repetition_penalty", 1.0),
    ("request_id", ""),
    ("response_format", {"type": "text"}),
    ("response_format", {"type": "text", "json_schema": None}),
    ("response_format", {}),
    ("return_token_ids", False),
    ("return_tokens_as_token_ids", False),
    ("safety_identifier", ""),
    ("service_tier", "auto"),
    ("session_id", "me"),
    ("stop", []),
    ("stop_token_ids", []),
    ("store", False),
    ("stream", False),
    ("stream_options", {}),
    ("stream_options", {"include_usage": False, "include_obfuscation": False}),
    ("structured_outputs", {}),
    ("truncation_side", "left"),
    ("use_beam_search", False),
    ("user", ""),
    ("vllm_xargs", {}),
]
NOTHING_CHAT = [
    *[(field, empty) for field in ("tools", "functions", "tool_choice", "documents") for empty in (False, "", [], {})],
    ("add_generation_prompt", True),
    ("chat_template", ""),
    ("chat_template_kwargs", {}),
    ("continue_final_message", False),
    ("documents", []),
    ("echo", False),
    ("function_call", "none"),
    ("functions", []),
    ("include_reasoning", True),
    ("mm_processor_kwargs", {}),
    ("modalities", ["text"]),
    ("modalities", []),
    ("parallel_tool_calls", False),
    ("prompt_cache_options", {"ttl": "30m"}),
    ("prompt_cache_retention", "24h"),
    ("reasoning_effort", "none"),
    ("tool_choice", "none"),
    ("tools", []),
    ("top_logprobs", 0),
    ("verbosity", "medium"),
]
CHAT, COMPLETION = (ChatRequest, {"messages": [MESSAGE]}), (CompletionRequest, {"prompt": "x"})


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        *[(kind, *case) for kind in (CHAT, COMPLETION) for case in NOTHING],
        *[(CHAT, *case) for case in NOTHING_CHAT],
        *[
            (COMPLETION, *case)
            for case in (("suffix", ""), ("echo", False), ("add_special_tokens", True), ("prompt_embeds", ""))
        ],
    ],
)
def test_a_neutral_value_is_accepted(kind, field, value):
    model, needed = kind
    plain, given = model.model_validate(needed), model.model_validate(needed | {field: value})
    assert given.sampling_params(5, None, 16, {}) == plain.sampling_params(5, None, 16, {})


CHANGES = [
    ("best_of", 3),
    ("bad_words", ["x"]),
    ("allowed_token_ids", [1]),
    ("detokenize", False),
    ("frequency_penalty", 0.1),
    ("guided_choice", ["a"]),
    ("guided_grammar", "x"),
    ("guided_json", {}),  # any JSON
    ("guided_json", {"type": "object"}),
    ("guided_regex", "x"),
    ("kv_transfer_params", {"a": 1}),
    ("length_penalty", 2),
    ("logit_bias", {"5": 1}),
    ("logits_processors", ["x"]),
    ("presence_penalty", 1),
    ("prompt_logprobs", 0),
    ("repetition_penalty", 1.1),
    ("request_id", "mine"),
    ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {}}),
    ("return_token_ids", True),
    ("return_tokens_as_token_ids", True),
    ("store", True),
    ("stream_options", {"include_usage": True}),  # without stream
    ("structured_outputs", {"regex": "x"}),
    ("truncate_prompt_tokens", -1),
    ("use_beam_search", True),
    ("vllm_xargs", {"a": 1}),
    ("nonsense", False),
    ("nonsense", {}),
]
CHANGES_CHAT = [
    ("audio", {"voice": "x"}),
    ("chat_template", "x"),
    ("chat_template_kwargs", {"messages": []}),
    ("chat_template_kwargs", {"tools": [1]}),
    ("chat_template_kwargs", []),
    ("continue_final_message", True),  # with a prompt for an answer
    ("documents", [{"title": "x"}]),
    ("echo", True),
    ("function_call", "auto"),
    ("functions", [{"name": "f"}]),
    ("mm_processor_kwargs", {"a": 1}),
    ("modalities", ["audio"]),
    ("moderation", {"model": "x"}),
    ("prediction", {"type": "content"}),
    ("reasoning_effort", "high"),
    ("tool_choice", "required"),
    ("tools", [{"type": "function"}]),
    ("top_logprobs", 1),  # without logprobs
    ("verbosity", "low"),
    ("web_search_options", {}),  # asks for a search
]


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        *[(kind, *case) for kind in (CHAT, COMPLETION) for case in CHANGES],
        *[(CHAT, *case) for case in CHANGES_CHAT],
        *[(COMPLETION, *case) for case in (("suffix", "x"), ("add_special_tokens", False), ("prompt_embeds", "x"))],
    ],
)
def test_a_value_that_would_change_the_answer_is_refused_by_name(kind, field, value):
    model, needed = kind
    with pytest.raises((ValidationError, ApiError)) as error:
        model.model_validate(needed | {field: value}).sampling_params(5, None, 16, {})
    if isinstance(error.value, ApiError):
        assert error.value.body["error"]["param"] == field
    else:
        assert isinstance(error.value, ValidationError)
        (found,) = error.value.errors()
        assert field in found["loc"] or found["ctx"]["field"] == field
