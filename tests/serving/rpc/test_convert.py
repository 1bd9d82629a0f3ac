"""Sampling parameters over the wire: what is sent is what arrives, and fields left out take the server's defaults."""

from __future__ import annotations

import pytest

from chameleon_jax.errors import InvalidGrammar
from chameleon_jax.sampling_params import SamplingParams, StructuredOutputsParams
from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages
from chameleon_jax.serving.rpc import convert

SCHEMA = {"type": "object", "properties": {"ä": {"type": "integer"}}}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(presence_penalty=-2.0, frequency_penalty=0.25, repetition_penalty=1.5),
        SamplingParams(logit_bias={0: -100.0, 511: 2.5}, allowed_token_ids=[3, 1, 2]),
        *[
            SamplingParams(structured_outputs=StructuredOutputsParams(**language))
            for language in (
                {"json": SCHEMA},
                {"json": False},
                {"json": SCHEMA, "whitespace_pattern": " ?"},
                {"regex": "[a-c]+"},
                {"choice": ["ü", "b"]},
                {"grammar": 'start: "a"'},
                {"json_object": True},
            )
        ],
    ],
)
def test_parameters_arrive_as_they_were_sent(params):
    assert convert.sampling_from_message(convert.sampling_to_message(params), {}) == params


def test_fields_left_out_take_the_servers_defaults():
    defaults = {"repetition_penalty": 1.25, "temperature": 0.5}
    params = convert.sampling_from_message(messages.SamplingParams(temperature=0.25), defaults)
    assert params == SamplingParams(repetition_penalty=1.25, temperature=0.25)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "nothing is set"),
        ({"regex": "x", "choice": ["x"]}, "regex and choice is set"),
        ({"json": "{"}, "json is '{'"),
        ({"regex": ""}, "regex is ''"),
    ],
)
def test_a_wrong_language_is_named(fields, reason):
    message = messages.SamplingParams(structured_outputs=messages.StructuredOutputs(**fields))
    with pytest.raises(InvalidGrammar, match=f"^structured_outputs: {reason}"):
        convert.sampling_from_message(message, {})
