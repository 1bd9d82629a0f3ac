"""Prompt and completion are one text that the model wrote, whichever way they are asked for: spaces, bytes and offsets."""

from __future__ import annotations

import pytest

from chameleon_jax import LLM, SamplingParams
from tests import text_models
from tests.serving.text_calls import GREEDY, LLAMA2, NUM_TOKENS, ask, complete
from tests.text_models import PROMPT, VARIANTS, written


@pytest.fixture(scope="module")
def offline(engines, llama2_model):
    with engines.borrow(llama2_model, num_pages=300) as engine, LLM(engine) as llm:
        yield llm


def test_a_completion_begins_with_its_space_whichever_way_it_is_asked_for(served):
    outputs = ask(served, PROMPT)
    ids = outputs[-1].outputs[0].token_ids
    expected = written(LLAMA2, LLAMA2.encode(PROMPT), ids)
    assert LLAMA2.backend.id_to_token(ids[0]).startswith("▁") and expected.startswith(" ")
    assert outputs[-1].outputs[0].text == expected
    assert all(expected.startswith(output.outputs[0].text) for output in outputs)
    for stream in (False, True):
        assert complete(served, stream, prompt=PROMPT).text == expected
        assert complete(served, stream, prompt=LLAMA2.encode(PROMPT)).text == expected
        assert complete(served, stream, prompt=PROMPT, echo=True).text == PROMPT + expected
        assert complete(served, stream, prompt=LLAMA2.encode(PROMPT), echo=True).text == PROMPT + expected
    assert served.rpc.generate(PROMPT, GREEDY).text == expected
    assert "".join(part.text for part in served.rpc.stream(PROMPT, GREEDY)) == expected


def test_an_answer_of_a_chat_goes_on_from_its_prompt(served):
    messages = [{"role": "user", "content": "hi"}]
    asked = dict(model="llama2", messages=messages, max_tokens=NUM_TOKENS, temperature=0, extra_body={"ignore_eos": True})
    prompt = LLAMA2.encode(LLAMA2.apply_chat_template(messages), add_special_tokens=False)
    expected = written(LLAMA2, prompt, ask(served, prompt)[-1].outputs[0].token_ids)
    assert served.openai.chat.completions.create(**asked).choices[0].message.content == expected
    chunks = served.openai.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_python_api_with_every_kind_of_tokenizer(variant, skip_special_tokens, offline, monkeypatch):
    tokenizer = VARIANTS[variant]
    monkeypatch.setattr(offline.engine, "tokenizer", tokenizer)
    params = SamplingParams(
        temperature=2.0, seed=1, max_tokens=NUM_TOKENS, ignore_eos=True, skip_special_tokens=skip_special_tokens, logprobs=4
    )
    prompts = [
        [1],
        tokenizer.encode("a"),
        tokenizer.encode(PROMPT),
        tokenizer.encode("[INST] hi [/INST]"),
        tokenizer.encode("€")[:-1],
    ]
    for prompt, output in zip(prompts, offline.generate([{"prompt_token_ids": ids} for ids in prompts], params)):
        completion = output.outputs[0]
        positions = [next(iter(position.values())) for position in completion.logprobs]
        data = b"".join(logprob.token_bytes for logprob in positions)
        begun = tokenizer.stream(skip_special_tokens, prompt).pending
        assert (begun + data).decode(errors="replace") == completion.text
        if not begun and "\ufffd" not in completion.text:
            assert completion.text == written(tokenizer, prompt, completion.token_ids, skip_special_tokens)


DRAWN = dict(temperature=1.5, seed=3)


def char_starts(data: bytes) -> list[int]:
    """The byte at which each character of a text begins; every part of a character that is broken off is one."""
    starts, at = [], 0
    while at < len(data):
        starts.append(at)
        try:
            at += len(data[at:].decode()[0].encode())
        except UnicodeDecodeError as error:
            at += error.end if error.start == 0 else len(data[at : at + error.start].decode()[0].encode())
    return starts


@pytest.mark.parametrize("prompt", [PROMPT, [1], LLAMA2.encode("€")[:-1]], ids=["text", "nothing", "part-of-a-character"])
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_completion_are_its_text(served, prompt, stream):
    prompt_ids = LLAMA2.encode(prompt) if isinstance(prompt, str) else prompt
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5, **DRAWN)
    expected = ask(served, prompt_ids, params)[-1].outputs[0]
    choice = complete(served, stream, prompt=prompt, logprobs=5, **DRAWN)
    logprobs = choice.logprobs
    assert choice.text == expected.text
    assert any(token.startswith("bytes:") for token in logprobs.tokens)
    chosen = [next(iter(position.values())) for position in expected.logprobs]
    assert logprobs.tokens == [logprob.decoded_token for logprob in chosen]
    for token, value, top, position in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, expected.logprobs):
        assert top[token] == value
        assert sorted(top.values()) == sorted(logprob.logprob for logprob in position.values())
    begun = LLAMA2.stream(True, prompt_ids).pending
    data = begun + b"".join(logprob.token_bytes for logprob in chosen)
    assert data.decode(errors="replace") == choice.text
    starts, at = char_starts(data), len(begun)
    for logprob, offset in zip(chosen, logprobs.text_offset):
        if logprob.token_bytes:
            assert offset == sum(start <= at for start in starts) - 1
        at += len(logprob.token_bytes)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat_are_its_text(served, stream):
    asked = dict(model="llama2", messages=[{"role": "user", "content": "hi"}], max_tokens=NUM_TOKENS, stream=stream, **DRAWN)
    answer = served.openai.chat.completions.create(**asked, logprobs=True, top_logprobs=5, extra_body={"ignore_eos": True})
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        text = "".join(choice.delta.content or "" for choice in choices)
        content = [token for choice in choices if choice.logprobs is not None for token in choice.logprobs.content]
    else:
        text, content = answer.choices[0].message.content, answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode(errors="replace") == text
    assert len({tuple(token.bytes) for token in content if token.token.startswith("bytes:")}) > 1
    for token in content:
        assert len({top.token for top in token.top_logprobs}) == 5
        for entry in (token, *token.top_logprobs):
            left_out = entry.token in text_models.SPECIAL
            part = entry.token.startswith("bytes:")
            assert part or left_out or bytes(entry.bytes) == entry.token.encode()
            assert not left_out or entry.bytes == []
            assert not part or "\ufffd" in bytes(entry.bytes).decode(errors="replace")


def test_logprobs_over_grpc_have_bytes(served):
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5, **DRAWN)
    expected = ask(served, PROMPT, params)[-1].outputs[0]
    whole = served.rpc.generate(PROMPT, params)
    assert whole.logprobs == expected.logprobs
    assert [position for part in served.rpc.stream(PROMPT, params) for position in part.logprobs or ()] == expected.logprobs


def test_tokens_of_one_text_do_not_hide_each_other(served):
    """ "A" and "<0x41>" are the same, and "▁with" and "with" at the start of a text."""
    hidden = 0
    for seed in range(4):
        params = SamplingParams(temperature=1.5, seed=seed, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=20)
        positions = ask(served, [1], params)[-1].outputs[0].logprobs
        tops = complete(served, prompt=[1], logprobs=20, temperature=1.5, seed=seed).logprobs.top_logprobs
        for position, top in zip(positions, tops):
            texts = [logprob.decoded_token for logprob in position.values()]
            assert sorted(top.values()) == sorted(logprob.logprob for logprob in position.values())
            assert {key for key in top if key not in texts} <= {f"token_id:{token_id}" for token_id in position}
            hidden += len(texts) - len(set(texts))
    assert hidden


def test_echo_of_token_ids_goes_on_inside_a_character(served):
    ids = LLAMA2.encode("a €")
    for cut in range(1, len(ids)):
        choice = complete(served, prompt=ids[:cut], echo=True)
        output = ask(served, ids[:cut])[-1].outputs[0]
        whole = LLAMA2.stream()
        assert choice.text == "".join(map(whole.append, [*ids[:cut], *output.token_ids])) + whole.flush()
    ids = LLAMA2.encode(f"</s>{PROMPT}")
    extra = {"ignore_eos": True, "skip_special_tokens": False}
    assert complete(served, prompt=ids, echo=True, extra_body=extra).text.startswith(LLAMA2.decode(ids, False))
