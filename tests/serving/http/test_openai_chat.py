"""Conversations by OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from chameleon_jax.checkpoints.chat_template import ChatTemplate
from chameleon_jax.checkpoints.detokenizer import shown
from tests.serving.http.offline import offline


def test_chat(client, shared_llm):
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    text = "system: Be kind.\nuser: hello\nassistant:"
    expected = offline(shared_llm, text, 16, "a2").text
    answer = client.chat.completions.create(model="a2", messages=messages, max_tokens=16, temperature=0)
    assert answer.choices[0].message.content == expected and answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(text) and answer.object == "chat.completion"
    chunks = list(client.chat.completions.create(model="a2", messages=messages, max_tokens=16, temperature=0, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    rest = client.chat.completions.create(model="a2", messages=messages, temperature=0)
    assert rest.usage.total_tokens == 128  # the whole context


def accumulated(chunks) -> dict[str, Any]:
    """Put a message together from a stream, as clients do: texts joined, the last of any other value."""
    message: dict[str, Any] = {}
    for chunk in chunks:
        for name, value in chunk.choices[0].delta.model_dump().items():
            message[name] = (
                message[name] + value if isinstance(value, str) and message.get(name) else value or message.get(name)
            )
    return message


def as_raw_json(client, **asked) -> dict[str, Any]:
    return json.loads(client.chat.completions.with_raw_response.create(**asked).text)["choices"][0]["message"]


KEPT = {
    "message": lambda client, **asked: client.chat.completions.create(**asked).choices[0].message,
    "model_dump": lambda client, **asked: client.chat.completions.create(**asked).choices[0].message.model_dump(),
    "to_dict": lambda client, **asked: client.chat.completions.create(**asked).choices[0].message.to_dict(),
    "without nulls": lambda client, **asked: (
        client.chat.completions.create(**asked).choices[0].message.model_dump(exclude_none=True)
    ),
    "raw JSON": as_raw_json,
    "stream": lambda client, **asked: accumulated(client.chat.completions.create(stream=True, **asked)),
    "of other servers": lambda client, **asked: {
        "role": "assistant",
        "content": client.chat.completions.create(**asked).choices[0].message.content,
        **dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning", "reasoning_content")),
        "provider_specific_fields": None,
    },
}


@pytest.mark.parametrize("keep", KEPT)
def test_a_conversation_that_keeps_the_answers(client, shared_llm, keep):
    """Each turn sees the whole text of the turns before."""
    messages: list[Any] = []
    text = ""
    for turn in ("hi", "so"):
        messages.append({"role": "user", "content": turn})
        text += f"user: {turn}\nassistant:"
        expected = offline(shared_llm, text, 6, "a1").text
        message = KEPT[keep](client, model="a1", messages=messages, max_tokens=6, temperature=0)
        content = message["content"] if isinstance(message, dict) else message.content
        assert content == expected
        messages.append(message)
        text = text.removesuffix("assistant:") + f"assistant: {expected}\n"


def test_variables_of_the_chat_template(client, shared_llm, monkeypatch):
    template = (
        "{{ enable_thinking }} {% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}{{ add_generation_prompt }}"
    )
    monkeypatch.setattr(shared_llm.tokenizer, "chat_template", ChatTemplate(template, {}))
    asked = dict(model="gqa", messages=[{"role": "user", "content": "hi", "name": "ann"}], max_tokens=1)
    answer = client.chat.completions.create(**asked, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert answer.usage.prompt_tokens == len("False ann: hiTrue")
    answer = client.chat.completions.create(
        **asked, extra_body={"add_generation_prompt": False, "continue_final_message": True}
    )
    assert answer.usage.prompt_tokens == len(" ann: hi")


def test_parts_of_other_types_are_refused_by_name(client):
    parts = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    with pytest.raises(openai.BadRequestError, match=r"messages\.1\.content\.1\.type is 'image_url'"):
        client.chat.completions.create(
            model="gqa", messages=[{"role": "user", "content": "hi"}, {"role": "user", "content": parts}]
        )


def test_max_completion_tokens_and_top_p(client):
    asked = dict(model="gqa", messages=[{"role": "user", "content": "hi"}], max_completion_tokens=7)
    greedy = client.chat.completions.create(**asked, temperature=0)
    assert greedy.usage.completion_tokens == 7
    narrow = client.chat.completions.create(**asked, temperature=2, seed=3, top_p=1e-9)
    wide = client.chat.completions.create(**asked, temperature=2, seed=3)
    assert narrow.choices[0].message.content == greedy.choices[0].message.content != wide.choices[0].message.content


@pytest.mark.parametrize("obfuscation", [False, True])
def test_obfuscation_is_accepted_and_ignored(client, obfuscation):
    options = {"include_usage": True, "include_obfuscation": obfuscation}
    chat = client.chat.completions.create(
        model="gqa", messages=[{"role": "user", "content": "hi"}], max_tokens=3, stream=True, stream_options=options
    )
    *chunks, last = chat
    assert last.usage.completion_tokens == 3 and not any(getattr(chunk, "obfuscation", None) for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_top", [None, 0, 3])
def test_logprobs_of_chat(client, stream, num_top):
    """The seed draws tokens that are not among the likeliest."""
    messages = [{"role": "user", "content": "hi"}]
    asked = dict(model="gqa", messages=messages, max_tokens=9, seed=1, logprobs=True, stream=stream)
    answer = client.chat.completions.create(**asked, extra_body={"top_logprobs": num_top})
    parts = [chunk.choices[0].logprobs for chunk in answer] if stream else [answer.choices[0].logprobs]
    content = [token for part in parts if part is not None for token in part.content]
    assert len(content) == 9
    unlikely = 0
    for token in content:
        assert len(token.top_logprobs) == (num_top or 0) and shown(bytes(token.bytes)) == token.token
        values = [top.logprob for top in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert token.logprob in values or all(token.logprob < value for value in values)
        unlikely += token.logprob not in values
    assert unlikely


@pytest.mark.parametrize("max_tokens", [8, None])
def test_min_tokens_of_a_chat(client, max_tokens):
    asked = dict(model="gqa", messages=[{"role": "user", "content": "hi"}], temperature=0, max_tokens=max_tokens)
    extra = {"stop_token_ids": list(range(97, 105)), "ignore_eos": True}
    for min_tokens in (0, 5):
        answer = client.chat.completions.create(**asked, extra_body=extra | {"min_tokens": min_tokens})
        assert answer.usage.completion_tokens >= min_tokens
    with pytest.raises(openai.BadRequestError, match=r"min_tokens is 500; allowed: 0 to max_tokens"):
        client.chat.completions.create(**asked, extra_body=extra | {"min_tokens": 500})
