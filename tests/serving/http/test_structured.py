"""Structured outputs, penalties, biases and allowed ids over HTTP, by OpenAI's own client."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest

from tests.serving.http.offline import offline

PROMPT = "The capital of"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "of"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["city", "size"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}


def complete(served, **fields: Any) -> Any:
    asked: dict[str, Any] = {"model": "llama2", "prompt": PROMPT, "max_tokens": 100, "seed": 1} | fields
    own = {name: asked.pop(name) for name in ("model", "prompt", "max_tokens", "seed")}
    return served.openai.completions.create(**own, extra_body=asked).choices[0]


def is_place(text: str) -> bool:
    place = json.loads(text)
    return set(place) == {"city", "size"} and place["city"] in ("Paris", "of") and 0 <= place["size"] <= 99


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_conversation_answers_json_of_the_schema(served, no_spaces, stream, temperature):
    answer = served.openai.chat.completions.create(
        model="llama2",
        messages=[{"role": "user", "content": "hi"}],
        response_format=JSON_SCHEMA,
        temperature=temperature,
        seed=2,
        max_tokens=60,
        stream=stream,
        logit_bias=no_spaces,
    )
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert reason == "stop" and is_place(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?"}},
        {"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"},
        {"guided_json": json.dumps(SCHEMA), "guided_whitespace_pattern": " ?"},
    ],
)
def test_vllms_fields_ask_for_json_too(served, fields):
    assert is_place(complete(served, **fields).text)


@pytest.mark.parametrize("field", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}])
def test_any_json_object(served, no_spaces, field):
    """The bias ends strings and objects soon."""
    backend = served.llm.tokenizer.backend
    bias = no_spaces | {str(backend.token_to_id(token)): 3 for token in ("<0x22>", "<0x7D>")}
    for seed in range(4):
        choice = complete(served, seed=seed, logit_bias=bias, **field)
        assert choice.finish_reason == "stop" and isinstance(json.loads(choice.text), dict)


@pytest.mark.parametrize("field", ["structured_outputs", "guided"])
@pytest.mark.parametrize(
    ("kind", "value", "pattern"),
    [
        ("regex", "[0-9]{3}-[a-c]{1,4}", "[0-9]{3}-[a-c]{1,4}"),
        ("choice", ["crimson", "deep sea blue", "ü"], "crimson|deep sea blue|ü"),
        ("grammar", 'start: "a" digit digit\ndigit: /[0-9]/', "a[0-9]{2}"),
    ],
)
def test_the_whole_output_is_of_the_language(served, field, kind, value, pattern):
    fields = {f"guided_{kind}": value} if field == "guided" else {field: {kind: value}}
    for temperature in (0, 1):
        choice = complete(served, temperature=temperature, **fields)
        assert re.fullmatch(pattern, choice.text) and choice.finish_reason == "stop"


def test_a_schema_that_cannot_be_compiled_is_refused_with_the_reason(served):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objct"}}}
    with pytest.raises(openai.BadRequestError) as error:
        complete(served, response_format=schema)
    assert error.value.param == "response_format" and error.value.type == "invalid_request_error"
    assert 'response_format: json is \'{"type": "objct"}\'; it cannot be compiled: Invalid type: objct' in str(error.value)


def test_a_model_without_an_end_of_sequence_id_has_no_structured_outputs(client):
    with pytest.raises(openai.BadRequestError, match="guided_regex: the model has no end-of-sequence id"):
        client.completions.create(model="gqa", prompt="x", extra_body={"guided_regex": "x"})


FEW: dict[str, Any] = {"allowed_token_ids": list(range(5, 250, 30))}
"""Tokens among which a random model repeats itself."""


@pytest.mark.parametrize(
    "fields",
    [
        FEW | {"presence_penalty": 2.0},
        FEW | {"frequency_penalty": 2.0},
        FEW | {"frequency_penalty": -2.0},
        FEW | {"repetition_penalty": 5.0},
        FEW | {"logit_bias": {5: 3, 35: -3}},
        {"logit_bias": {7: 100}},
        {"allowed_token_ids": [9, 60]},
    ],
)
def test_logits_are_adjusted_as_by_the_python_api(client, shared_llm, fields):
    def complete(fields: dict[str, Any]) -> str:
        answer = client.completions.create(model="gqa", prompt="love is", max_tokens=24, temperature=0, extra_body=fields)
        return answer.choices[0].text

    assert complete(fields) == offline(shared_llm, "love is", 24, **fields).text != complete(FEW)
