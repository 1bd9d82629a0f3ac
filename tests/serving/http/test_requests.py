"""Bodies that are wrong in very many places: their check ends at the first."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from chameleon_jax.request import MAX_STOP_IDS
from chameleon_jax.serving.http.models import LoadLora
from chameleon_jax.serving.http.requests import MAX_MESSAGES, MAX_PARTS, ChatRequest, CompletionRequest

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
