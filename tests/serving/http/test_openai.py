"""Models and completions by OpenAI's own client, and fields that both kinds of completions share."""

from __future__ import annotations

import time

import openai
import pytest

from chameleon_jax.checkpoints.detokenizer import shown
from tests.serving.http.offline import PROMPT, offline, offline_output
from tests.serving.http.plain import error_of


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


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_alone_may_take_the_whole_context(client, shared_llm, stream):
    prompt = [40 + i % 60 for i in range(shared_llm.max_model_len)]
    asked = dict(model="a1", max_tokens=0, echo=True, logprobs=0, temperature=0)
    answer = client.completions.create(prompt=prompt, stream=stream, **asked)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    values = [value for choice in choices for value in choice.logprobs.token_logprobs]
    shorter = client.completions.create(prompt=prompt[:-1], **asked).choices[0].logprobs.token_logprobs
    assert len(values) == 128 and values[:-1] == [None, *map(pytest.approx, shorter[1:])]
    assert choices[-1].finish_reason == "length"
    for wrong in (dict(prompt=[*prompt, 40]), dict(prompt=prompt, max_tokens=1)):
        with pytest.raises(openai.BadRequestError, match="allowed: 128"):
            client.completions.create(**(asked | wrong))


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
    assert error.value.param is not None and error.value.param.split(".")[0] == field


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"stop_token_ids": [256]}, "stop_token_ids"),
        ({"prompt": [256]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 10_000}, "prompt"),
        ({"prompt": [1] * 129}, "prompt"),
        ({"prompt": [1] * 128, "max_tokens": 1}, "prompt"),
        ({"prompt": [1] * 127, "max_tokens": 2}, "max_tokens"),
        ({"lora": [{"name": "a0"}, {"name": "a0"}]}, "lora"),
    ],
)
def test_values_out_of_range_are_named_as_param(http, fields, param):
    response = http.post("/v1/completions", json={"prompt": PROMPT} | fields)
    assert response.status_code == 400 and error_of(response)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 500}, "max_completion_tokens"),
        ({"max_tokens": 500}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 128}]}, "messages"),
    ],
)
def test_params_of_a_chat_have_the_names_of_its_fields(http, fields, param):
    response = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]} | fields)
    assert response.status_code == 400 and error_of(response)["param"] == param


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
