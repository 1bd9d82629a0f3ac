"""Messages in the form of chat templates, and messages that are refused."""

from __future__ import annotations

import typing

import openai.types.chat
import pytest
from pydantic import ValidationError

from chameleon_jax.serving.http.messages import Message


def test_every_role_of_openais_clients_is_known():
    for params in typing.get_args(openai.types.chat.ChatCompletionMessageParam):
        (role,) = typing.get_args(typing.get_type_hints(params)["role"])
        assert Message.model_validate({"role": role, "content": "x"}).for_template()["content"] == "x"


@pytest.mark.parametrize(
    ("message", "given"),
    [
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
        ({"role": "assistant"}, {"role": "assistant", "content": ""}),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
        ({"role": "assistant", "content": None, "refusal": "no"}, {"role": "assistant", "content": "no"}),
        ({"role": "assistant", "content": "x", "refusal": ""}, {"role": "assistant", "content": "x"}),
        (
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                    {"type": "text", "text": "b"},
                ],
            },
            {"role": "user", "content": "ab"},
        ),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, {"role": "assistant", "content": "no"}),
        ({"role": "user", "content": "x", "name": "ann"}, {"role": "user", "content": "x", "name": "ann"}),
        ({"role": "tool", "content": "3", "tool_call_id": "c1"}, {"role": "tool", "content": "3", "tool_call_id": "c1"}),
        ({"role": "function", "content": "3", "name": "f"}, {"role": "function", "content": "3", "name": "f"}),
        *[
            (
                {"role": "assistant", "content": None, "tool_calls": [{**call, "function": {"name": "f", **arguments}}]},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{**call, "type": "function", "function": {"name": "f", "arguments": seen}}],
                },
            )
            for call in ({"id": "c1"}, {})
            for arguments, seen in (
                ({"arguments": '{"a": [1]}'}, {"a": [1]}),
                ({"arguments": {"a": 1}}, {"a": 1}),
                ({"arguments": ""}, {}),
                ({}, {}),
                ({"arguments": '{"a": '}, '{"a": '),  # as a model wrote it
                ({"arguments": "[1]"}, "[1]"),
            )
        ],
        (
            {"role": "assistant", "content": None, "tool_calls": [{"index": 0, "type": "function", "function": {"name": "f"}}]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
            },
        ),
        (
            {"role": "assistant", "content": "x", "reasoning_content": "so", "reasoning": None},
            {"role": "assistant", "content": "x", "reasoning_content": "so"},
        ),
        (
            {
                "role": "assistant",
                "content": "x",
                "tool_calls": [],
                "annotations": [],
                "function_call": {},
                "audio": {},
                "cache_control": {},
            },
            {"role": "assistant", "content": "x"},
        ),
    ],
)
def test_messages_as_templates_know_them(message, given):
    assert Message.model_validate(message).for_template() == given


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ({"tool_calls": [{"id": "c1"}]}, ("tool_calls", 0, "function")),
        ({"tool_calls": [{"type": "custom", "custom": {}}]}, ("tool_calls", 0)),
        ({"function_call": {"name": "f"}}, ("function_call",)),
        ({"audio": {"id": "a"}}, ("audio",)),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ("content", 0, "type")),
        ({"content": [{"type": "input_audio", "input_audio": {}}]}, ("content", 0, "type")),
        ({"content": [{"type": "text", "refusal": "x"}]}, ("content", 0)),
    ],
)
def test_messages_of_more_than_text(message, place):
    with pytest.raises(ValidationError) as error:
        Message.model_validate({"role": "assistant"} | message)
    assert tuple(part for part in error.value.errors()[-1]["loc"] if not str(part).startswith("list[")) == place
