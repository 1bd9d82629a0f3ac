"""Requests by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import openai
import pytest

from chameleon_jax import LoRARequest, SamplingParams
from chameleon_jax.checkpoints.chat_template import ChatTemplate
from chameleon_jax.checkpoints.detokenizer import shown

PROMPT = "love is"


def offline(llm, prompt, tokens: int, lora: str | None = None, **params):
    return offline_output(llm, prompt, tokens, lora, **params).outputs[0]


def offline_output(llm, prompt, tokens: int, lora: str | None = None, **params):
    async def main():
        request = None if lora is None else LoRARequest(lora)
        asked = SamplingParams(temperature=0, max_tokens=tokens, **params)
        return [output async for output in llm.generate(prompt, asked, request)][-1]

    return asyncio.run(main())


def test_models(client):
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["gqa", "a0", "a1", "a2", "a3"]
    assert models["gqa"].parent is None and models["a1"].parent == "gqa" and models["a1"].max_model_len == 128
    assert client.models.retrieve("a2").id == "a2"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("a9")
    assert error.value.code == "model_not_found"


def test_a_model_without_a_name(http):
    response = http.get("/v1/models/")
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


def test_created_is_the_time_of_arrival(client, server, monkeypatch):
    monkeypatch.setattr(server.service, "created", 1)
    before = int(time.time())
    messages = [{"role": "user", "content": "hi"}]
    for stream in (False, True):
        answers = [
            client.completions.create(model="gqa", prompt=PROMPT, max_tokens=1, stream=stream),
            client.chat.completions.create(model="gqa", messages=messages, max_tokens=1, stream=stream),
        ]
        for answer in answers:
            for part in answer if stream else [answer]:
                assert before <= part.created <= time.time()
    assert client.models.retrieve("gqa").created == 1


@pytest.mark.parametrize("model", ["gqa", "a0", "a3"])
def test_completion_and_its_stream(client, shared_llm, model):
    expected = offline(shared_llm, PROMPT, 24, None if model == "gqa" else model)
    whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0)
    assert whole.choices[0].text == expected.text and whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (7, 24, 31)
    assert whole.model == model and whole.id.startswith("cmpl-")
    chunks = list(client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text and len(chunks) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_of_a_stream(client):
    asked = dict(model="gqa", prompt=PROMPT, max_tokens=9, stream=True, stream_options={"include_usage": True})
    *chunks, last = client.completions.create(**asked)
    assert last.choices == [] and (last.usage.prompt_tokens, last.usage.completion_tokens) == (7, 9)
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_in_every_event(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = dict(model="gqa", max_tokens=9, stream=True, stream_options=options)
    for chunks in (
        list(client.completions.create(prompt=PROMPT, **asked)),
        list(client.chat.completions.create(messages=[{"role": "user", "content": "hi"}], **asked))[1:],
    ):
        counts = [chunk.usage.completion_tokens for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == 9 and counts[0] >= 1


def test_several_prompts_and_choices(client, shared_llm):
    prompts = [PROMPT, "0123456789"]
    answer = client.completions.create(model="a1", prompt=prompts, max_tokens=8, temperature=0, n=2)
    texts = [offline(shared_llm, prompt, 8, "a1").text for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (17, 32)
    ids = [shared_llm.tokenizer.encode(prompt) for prompt in prompts]
    answer = client.completions.create(model="a1", prompt=ids, max_tokens=8, temperature=0)
    assert [choice.text for choice in answer.choices] == texts[::2]
    answer = client.completions.create(model="a1", prompt=ids[1], max_tokens=8, temperature=0)
    assert [choice.text for choice in answer.choices] == texts[2:3]


def test_seeds_and_n(client):
    asked = dict(model="gqa", prompt=PROMPT, max_tokens=12, seed=5, n=3)
    first, second = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices] and len(set(texts)) == 3
    streamed = [""] * 3
    for chunk in client.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts
    alone = client.completions.create(**(asked | {"n": 1}))
    assert alone.choices[0].text == texts[0]


@pytest.mark.parametrize("stream", [False, True])
def test_stop(client, shared_llm, stream):
    text = offline(shared_llm, PROMPT, 24).text
    stop = text[9:12]
    cut = text[: text.index(stop)]
    answer = client.completions.create(
        model="gqa", prompt=PROMPT, max_tokens=24, temperature=0, stop=["\0\0", stop], stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == cut
    assert choices[-1].finish_reason == "stop" and choices[-1].stop_reason == stop


def test_echo(client):
    answer = client.completions.create(model="gqa", prompt=PROMPT, max_tokens=4, temperature=0)
    echoed = client.completions.create(model="gqa", prompt=PROMPT, max_tokens=4, temperature=0, echo=True)
    assert echoed.choices[0].text == PROMPT + answer.choices[0].text
    chunks = client.completions.create(model="gqa", prompt=PROMPT, max_tokens=4, temperature=0, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == echoed.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_completions(client, shared_llm, stream):
    expected = offline(shared_llm, PROMPT, 6, logprobs=2)
    answer = client.completions.create(model="gqa", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=2, stream=stream)
    parts = [chunk.choices[0].logprobs for chunk in answer] if stream else [answer.choices[0].logprobs]
    chosen = [value for part in parts for value in part.token_logprobs]
    assert chosen == pytest.approx([position[t].logprob for t, position in zip(expected.token_ids, expected.logprobs)])
    tokens = [shown(shared_llm.tokenizer.token_bytes.inside(t)) for t in expected.token_ids]
    assert [token for part in parts for token in part.tokens] == tokens
    assert [len(top) for part in parts for top in part.top_logprobs] == list(map(len, expected.logprobs))


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_begins_with_the_prompts(client, shared_llm, stream):
    asked = dict(model="a2", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=2)
    answer = client.completions.create(**asked).choices[0]
    output = offline_output(shared_llm, PROMPT, 1, "a2", prompt_logprobs=2)
    ids, expected = output.prompt_token_ids, output.prompt_logprobs
    echoed = client.completions.create(**asked, echo=True, stream=stream)
    choices = [chunk.choices[0] for chunk in echoed] if stream else echoed.choices
    assert "".join(choice.text for choice in choices) == PROMPT + answer.text
    tokens, values, tops, offsets = (
        [value for choice in choices for value in getattr(choice.logprobs, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    )
    assert len(tokens) == len(ids) + 5 and (values[0], tops[0]) == (None, None)
    assert values[1 : len(ids)] == pytest.approx([position[t].logprob for t, position in zip(ids[1:], expected[1:])])
    assert tops[len(ids) :] == answer.logprobs.top_logprobs and values[len(ids) :] == answer.logprobs.token_logprobs
    assert "".join(tokens[: len(ids)]) == PROMPT and offsets[: len(ids)] == list(range(len(PROMPT)))
    assert offsets[len(ids) :] == [len(PROMPT) + offset for offset in answer.logprobs.text_offset]


def test_a_prompt_alone_is_echoed_with_its_log_probabilities(client):
    asked = dict(model="gqa", prompt=PROMPT, temperature=0, logprobs=1, echo=True)
    whole = client.completions.create(**asked, max_tokens=1)
    alone = client.completions.create(**asked, max_tokens=0)
    assert alone.choices[0].text == PROMPT and alone.usage.completion_tokens == 0
    assert alone.choices[0].logprobs.token_logprobs == whole.choices[0].logprobs.token_logprobs[:-1]
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="gqa", prompt=PROMPT, max_tokens=0)


def test_prompt_logprobs_in_vllms_form(client, shared_llm):
    expected = offline_output(shared_llm, PROMPT, 1, prompt_logprobs=1)
    body = {"prompt_logprobs": 1}
    [choice] = client.completions.create(model="gqa", prompt=PROMPT, max_tokens=1, extra_body=body).choices
    found = choice.model_extra["prompt_logprobs"]
    assert found[0] is None and len(found) == len(expected.prompt_token_ids)
    for now, then in zip(found[1:], expected.prompt_logprobs[1:]):
        assert now.keys() == {str(i) for i in then}
        assert [p["logprob"] for p in now.values()] == pytest.approx([p.logprob for p in then.values()])
    messages = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model="gqa", messages=messages, max_tokens=1, extra_body=body)
    assert len(answer.model_extra["prompt_logprobs"]) == answer.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs is set; allowed: not together with stream"):
        client.completions.create(model="gqa", prompt=PROMPT, stream=True, extra_body=body)


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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": []}}]),
        ("tool_choice", "auto"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objct"}}}),
        ("response_format", {"type": "xml"}),
        ("structured_outputs", {"grammar": "start: x"}),
        ("guided_json", "{"),
        ("guided_regex", "("),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"100000": 1}),
        ("allowed_token_ids", [100000]),
        ("allowed_token_ids", [-1]),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("modalities", ["text", "audio"]),
        ("store", True),
        ("n", 0),
        ("n", 17),
        ("temperature", -1),
        ("temperature", 1e9),
        ("top_p", 0),
        ("max_tokens", 0),
        ("max_tokens", 10**9),
        ("seed", 2**70),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("top_logprobs", 5),
        ("echo", True),
        ("add_special_tokens", True),
        ("include_stop_str_in_output", "yes"),
        ("continue_final_message", True),
        ("chat_template", "x"),
        ("spaces_between_special_tokens", False),
    ],
)
def test_unsupported_and_invalid_fields_are_named(client, field, value):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="gqa", messages=[{"role": "user", "content": "hi"}], extra_body={field: value})
    assert field in str(error.value) and error.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "logit_bias": {},
            "parallel_tool_calls": True,
        },
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "store": False, "modalities": ["text"]},
        {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "n": None, "stop": None, "stream": False},
        {"include_stop_str_in_output": False, "spaces_between_special_tokens": True, "echo": False},
        {"add_generation_prompt": True, "add_special_tokens": False},
    ],
)
def test_neutral_values_are_accepted(client, fields):
    answer = client.chat.completions.create(
        model="gqa", messages=[{"role": "user", "content": "hi"}], max_tokens=2, extra_body=fields
    )
    assert answer.usage.completion_tokens == 2


def test_fields_of_vllm(client, shared_llm):
    extra = {"top_k": 1, "min_p": 0.1, "min_tokens": 3, "ignore_eos": True, "skip_special_tokens": False, "stop_token_ids": [7]}
    extra |= {"include_stop_str_in_output": False, "spaces_between_special_tokens": True, "add_special_tokens": True}
    answer = client.completions.create(model="gqa", prompt=PROMPT, max_tokens=8, extra_body=extra)
    expected = offline(shared_llm, PROMPT, 8, min_tokens=3, stop_token_ids=[7])
    assert answer.choices[0].text == expected.text


@pytest.mark.parametrize("max_tokens", [8, None])
def test_min_tokens_of_a_chat(client, max_tokens):
    asked = dict(model="gqa", messages=[{"role": "user", "content": "hi"}], temperature=0, max_tokens=max_tokens)
    extra = {"stop_token_ids": list(range(97, 105)), "ignore_eos": True}
    for min_tokens in (0, 5):
        answer = client.chat.completions.create(**asked, extra_body=extra | {"min_tokens": min_tokens})
        assert answer.usage.completion_tokens >= min_tokens
    with pytest.raises(openai.BadRequestError, match=r"min_tokens is 500; allowed: 0 to max_tokens"):
        client.chat.completions.create(**asked, extra_body=extra | {"min_tokens": 500})


def test_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="nobody", prompt=PROMPT)
    assert error.value.code == "model_not_found" and "nobody" in str(error.value)


def test_loading_replacing_and_unloading(client, http, shared_llm):
    body = {"lora_name": "live", "lora_path": "a0"}
    assert http.post("/v1/load_lora_adapter", json=body).json() == {"lora_name": "live", "already_loaded": False}
    assert http.post("/v1/load_lora_adapter", json=body).json()["already_loaded"]

    def ask() -> str:
        return client.completions.create(model="live", prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text

    assert ask() == offline(shared_llm, PROMPT, 8, "a0").text
    assert http.post("/v1/load_lora_adapter", json=body | {"lora_path": "a1"}).status_code == 200
    assert ask() == offline(shared_llm, PROMPT, 8, "a1").text
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "live"}).status_code == 200
    with pytest.raises(openai.NotFoundError):
        ask()
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "live"}).status_code == 404
