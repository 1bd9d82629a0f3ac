"""Fields of requests: accepted, refused by name, or wrong in many places, of which only the first is reported."""

from __future__ import annotations

import typing
from typing import Any

import openai.types.chat.completion_create_params
import openai.types.completion_create_params
import openai.types.shared_params
import openai.types.shared_params.response_format_json_schema
import pytest
from pydantic import ValidationError

from chameleon_jax.sampling_params import MAX_STOP_IDS, SamplingParams, StructuredOutputsParams
from chameleon_jax.serving.http.errors import ApiError
from chameleon_jax.serving.http.messages import MAX_PARTS, Message, Part, ToolCall
from chameleon_jax.serving.http.models import LoadLora, UnloadLora
from chameleon_jax.serving.http.requests import ChatRequest, CompletionRequest, StreamOptions
from chameleon_jax.serving.http.structured import JsonSchema, ResponseFormat
from chameleon_jax.serving.http.template_fields import MAX_MESSAGES
from chameleon_jax.serving.http.tool_definitions import FunctionDefinition, ToolDefinition

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
        (CompletionRequest, {"prompt": "x", "guided_choice": [None] * MANY}),
        (CompletionRequest, {"prompt": "x", "allowed_token_ids": [None] * MANY}),
        (CompletionRequest, {"prompt": "x", "logit_bias": dict.fromkeys(UNKNOWN, "x")}),
        (CompletionRequest, {"prompt": "x", "structured_outputs": UNKNOWN}),
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
        (openai.types.shared_params.ResponseFormatText, ResponseFormat),
        (openai.types.shared_params.ResponseFormatJSONObject, ResponseFormat),
        (openai.types.shared_params.ResponseFormatJSONSchema, ResponseFormat),
        (openai.types.shared_params.response_format_json_schema.JSONSchema, JsonSchema),
        (openai.types.chat.ChatCompletionContentPartTextParam, Part),
        (openai.types.chat.ChatCompletionContentPartRefusalParam, Part),
        (openai.types.chat.ChatCompletionFunctionToolParam, ToolDefinition),
        (openai.types.shared_params.FunctionDefinition, FunctionDefinition),
        (openai.types.chat.ChatCompletionMessageFunctionToolCallParam, ToolCall),
        *[(params, Message) for params in typing.get_args(openai.types.chat.ChatCompletionMessageParam)],
    ],
)
def test_every_field_of_openais_clients_is_known(params, kind):
    assert fields_of(params) <= {field.alias or name for name, field in kind.model_fields.items()}


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


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
USED: list[tuple[str, Any, dict[str, Any]]] = [
    ("presence_penalty", 1, {"presence_penalty": 1}),
    ("frequency_penalty", -0.1, {"frequency_penalty": -0.1}),
    ("repetition_penalty", 1.1, {"repetition_penalty": 1.1}),
    ("logit_bias", {"5": 1, "0": -100}, {"logit_bias": {5: 1, 0: -100}}),
    ("allowed_token_ids", [3, 1], {"allowed_token_ids": (3, 1)}),
    *[
        (field, value, {"structured_outputs": StructuredOutputsParams(**language)})
        for field, value, language in (
            ("response_format", {"type": "json_object"}, {"json_object": True}),
            ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, {"json": SCHEMA}),
            ("response_format", {"type": "json_schema", "json_schema": {"schema": {}, "strict": False}}, {"json": {}}),
            ("structured_outputs", {"json": SCHEMA, "whitespace_pattern": " "}, {"json": SCHEMA, "whitespace_pattern": " "}),
            ("structured_outputs", {"json": False}, {"json": False}),
            ("structured_outputs", {"json_object": True, "disable_fallback": False}, {"json_object": True}),
            ("structured_outputs", {"regex": "x"}, {"regex": "x"}),
            ("structured_outputs", {"choice": ["a", "b"], "regex": None}, {"choice": ["a", "b"]}),
            ("structured_outputs", {"grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
            ("guided_json", {}, {"json": {}}),  # any JSON
            ("guided_json", '{"type": "object"}', {"json": {"type": "object"}}),
            ("guided_regex", "x", {"regex": "x"}),
            ("guided_choice", ["a"], {"choice": ["a"]}),
            ("guided_grammar", "x", {"grammar": "x"}),
        )
    ],
]


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize(("field", "value", "expected"), USED)
def test_penalties_biases_and_languages_reach_the_sampling_parameters(kind, field, value, expected):
    needed = {"messages": [MESSAGE]} if kind is ChatRequest else {"prompt": "x"}
    [params] = kind.model_validate(needed | {field: value}).sampling_params(5, None, 16, {})
    assert params == SamplingParams(max_tokens=5, **expected)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"response_format": {"type": "json_object"}, "guided_regex": "x"}, "guided_regex"),
        ({"structured_outputs": {"regex": "x"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "x"}, "guided_choice": ["x"]}, "guided_choice"),
    ],
)
def test_only_one_field_may_ask_for_a_language(fields, named):
    with pytest.raises(ApiError) as error:
        CompletionRequest.model_validate({"prompt": "x"} | fields).sampling_params(5, None, 16, {})
    assert error.value.body["error"]["param"] == named and "one of them" in error.value.body["error"]["message"]


def test_text_as_response_format_leaves_room_for_another_language():
    body = {"prompt": "x", "response_format": {"type": "text"}, "guided_json": True, "guided_whitespace_pattern": " ?"}
    [params] = CompletionRequest.model_validate(body).sampling_params(5, None, 16, {})
    assert params.structured_outputs == StructuredOutputsParams(json=True, whitespace_pattern=" ?")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        *[(field, value, "-2 to 2") for field in ("presence_penalty", "frequency_penalty") for value in (-2.1, 3)],
        *[("repetition_penalty", value, "above 0, finite") for value in (0, -1)],
        *[("logit_bias", {"5": value}, "amounts of -100 to 100") for value in (-101, 100.5)],
    ],
)
def test_values_out_of_range_are_refused_with_what_is_allowed(field, value, allowed):
    body = CompletionRequest.model_validate({"prompt": "x", field: value})
    with pytest.raises(ValueError, match=rf"^{field} is .*; allowed: {allowed}$"):
        body.sampling_params(5, None, 16, {})


CHANGES = [
    ("best_of", 3),
    ("bad_words", ["x"]),
    ("detokenize", False),
    ("kv_transfer_params", {"a": 1}),
    ("length_penalty", 2),
    ("logits_processors", ["x"]),
    ("request_id", "mine"),
    ("response_format", {"type": "json_schema", "json_schema": {}}),
    ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"a": float("inf")}}}),
    ("response_format", {"type": "grammar"}),
    ("response_format", {"type": "json_object", "json_object": {}}),
    ("guided_json", "{"),
    ("guided_choice", [""]),
    ("guided_whitespace_pattern", " "),  # without JSON
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"5": "much"}),
    ("logit_bias", {str(i): 1 for i in range(301)}),
    ("allowed_token_ids", ["5"]),
    ("structured_outputs", {"regex": "x", "choice": ["x"]}),
    ("structured_outputs", {"json_object": False}),
    ("structured_outputs", {"disable_any_whitespace": True}),
    ("structured_outputs", {"structural_tag": "x"}),
    ("structured_outputs", {"nonsense": "x"}),
    ("return_token_ids", True),
    ("return_tokens_as_token_ids", True),
    ("store", True),
    ("stream_options", {"include_usage": True}),  # without stream
    ("truncate_prompt_tokens", -1),
    ("use_beam_search", True),
    ("vllm_xargs", {"a": 1}),
    ("nonsense", False),
    ("nonsense", {}),
]
CHANGES_CHAT = [
    ("audio", {"voice": "x"}),
    ("chat_template", 5),
    ("chat_template_kwargs", {"messages": []}),
    ("chat_template_kwargs", {"tools": [1]}),
    ("chat_template_kwargs", []),
    ("continue_final_message", True),  # with a prompt for an answer
    ("documents", ["x"]),
    ("echo", True),
    ("function_call", "auto"),
    ("functions", [{"name": "f"}]),
    ("mm_processor_kwargs", {"a": 1}),
    ("modalities", ["audio"]),
    ("moderation", {"model": "x"}),
    ("prediction", {"type": "content"}),
    ("reasoning_effort", "highest"),
    ("tool_choice", "required"),  # without tools
    ("tool_choice", "any"),
    ("tool_choice", {"type": "allowed_tools", "allowed_tools": {}}),
    ("tools", [{"type": "function"}]),
    ("tools", [{"type": "custom", "custom": {"name": "f"}}]),
    ("tools", [{"type": "function", "function": {"name": "a b"}}]),
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
        body = model.model_validate(needed | {field: value})
        with body.name_language():
            body.sampling_params(5, None, 16, {})
    if isinstance(error.value, ApiError):
        assert error.value.body["error"]["param"] == field
    else:
        assert isinstance(error.value, ValidationError)
        (found,) = error.value.errors()
        assert field in found["loc"] or found["ctx"]["field"] == field


def test_tools_reach_the_template_as_the_client_wrote_them():
    """The order of fields is the one that models are trained on; fields left out or null are absent."""
    parameters = {"type": "object", "properties": {"a": {"enum": [None, 1], "default": None}}}
    function = {"strict": True, "parameters": parameters, "description": None, "name": "f"}
    body = {"messages": [MESSAGE], "tools": [{"function": function, "type": "function"}]}
    (tool,) = ChatRequest.model_validate(body).template_variables()["tools"]
    assert tool == {"type": "function", "function": {"name": "f", "parameters": parameters}}
    assert [*tool, *tool["function"]] == ["type", "function", "name", "parameters"]
    assert "tools" not in ChatRequest.model_validate(body | {"tool_choice": "none"}).template_variables()
