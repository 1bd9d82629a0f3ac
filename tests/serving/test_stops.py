"""Where texts end, asked over HTTP, gRPC and Python: at the first stop string of what the model wrote."""

from __future__ import annotations

import dataclasses

import pytest

from tests.chameleon_jax.test_output_processor import ended
from tests.serving.text_calls import GREEDY, LLAMA2, NUM_TOKENS, ask, complete
from tests.text_models import PROMPT


@pytest.fixture(scope="module")
def whole(served):
    """What the model writes without a stop."""
    return ask(served, PROMPT)[-1].outputs[0]


def stop_lists(text: str) -> list[list[str]]:
    return [
        [text[:5]],  # begins with the space
        [" "],
        [text[12:20]],  # from inside of one token to inside of another
        [text[20:24], text[9:13]],  # the second is first in the text
        [text[9:16], text[11:13], text[8:13]],  # one inside of another
        [PROMPT[-2:] + text[:3], text[-4:]],  # begins in the prompt, which is no part of it
        ["never to be seen"],
    ]


@pytest.mark.parametrize("which", range(7))
@pytest.mark.parametrize("include", [False, True])
def test_every_way_ends_where_letters_would(served, whole, which, include):
    stops = stop_lists(whole.text)[which]
    text, reason = ended(whole.text, stops)
    expected = text + reason if include and reason is not None else text
    params = dataclasses.replace(GREEDY, stop=stops, include_stop_str_in_output=include, logprobs=1)
    outputs = ask(served, PROMPT, params)
    last = outputs[-1].outputs[0]
    assert (last.text, last.stop_reason) == (expected, reason)
    assert last.finish_reason == ("length" if reason is None else "stop")
    assert all(expected.startswith(output.outputs[0].text) for output in outputs)
    # the tokens are those that were made, the last one that of the stop string's end
    assert last.token_ids == whole.token_ids[: len(last.token_ids)] and len(last.logprobs) == len(last.token_ids)
    written = b"".join(next(iter(position.values())).token_bytes for position in last.logprobs).decode(errors="replace")
    assert written.startswith(text + (reason or ""))
    extra = {"ignore_eos": True, "include_stop_str_in_output": include}
    for stream in (False, True):
        choice = complete(served, stream, prompt=PROMPT, stop=stops, logprobs=1, extra_body=extra)
        assert (choice.text, choice.stop_reason) == (expected, reason)
        assert len(choice.logprobs.tokens) == len(last.token_ids)
    answer = served.rpc.generate(PROMPT, params)
    assert (answer.text, answer.stop_reason, answer.token_ids) == (expected, reason, last.token_ids)
    parts = list(served.rpc.stream(PROMPT, params))
    assert "".join(part.text for part in parts) == expected and parts[-1].stop_reason == reason


@pytest.mark.parametrize("include", [False, True])
def test_the_text_of_a_stop_token_is_kept_on_request(served, whole, include):
    stop = whole.token_ids[3]
    count = whole.token_ids.index(stop) + 1
    stream = LLAMA2.stream(prompt_token_ids=LLAMA2.encode(PROMPT))
    pieces = [stream.append(token_id) for token_id in whole.token_ids[:count]]
    params = dataclasses.replace(GREEDY, stop_token_ids=[stop], include_stop_str_in_output=include)
    for answer in (ask(served, PROMPT, params)[-1].outputs[0], served.rpc.generate(PROMPT, params)):
        assert answer.text == "".join(pieces if include else pieces[:-1])
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop) and len(answer.token_ids) == count


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_count_after_min_tokens(served, whole, include):
    stream = LLAMA2.stream(prompt_token_ids=LLAMA2.encode(PROMPT))
    pieces = [stream.append(token_id) for token_id in whole.token_ids]
    for min_tokens in (1, 5, NUM_TOKENS):
        params = dataclasses.replace(GREEDY, stop=" ", min_tokens=min_tokens, include_stop_str_in_output=include)
        before = "".join(pieces[:min_tokens])
        rest, stop = ended(whole.text[len(before) :], [" "])
        expected = whole.text if min_tokens == NUM_TOKENS else before + rest + (stop if include else "")
        assert ask(served, PROMPT, params)[-1].outputs[0].text == expected
