"""Tools by OpenAI's own client. The text of the small model is replaced, as it calls no tool by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from chameleon_jax.checkpoints.chat_template import ChatTemplate
from chameleon_jax.sampling_params import SamplingParams, StructuredOutputsParams
from chameleon_jax.serving.service.server_config import ServerConfig
from chameleon_jax.serving.tools.styles import STYLES
from tests.serving.running import TIMEOUT, running

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "Tell it.", "parameters": PARAMETERS}}
NOW: Any = {"type": "function", "function": {"name": "now", "strict": True}}
TOOLS = [WEATHER, NOW]
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
CALL = '{"name": "weather", "arguments": {"city": "Bern"}}'
HERMES = f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n" + '{"name": "now", "arguments": {}}\n</tool_call>'
END = "\0"
"""Stop string of every request here."""


class Script:
    """Stand-in for the text of a request: each token is the next characters of `text`."""

    def __init__(self, text: str, step: int):
        self._pieces = (text[at : at + step] for at in range(0, len(text), step))

    def append(self, token_id: int) -> str:
        return next(self._pieces, END)

    def flush(self) -> str:
        return ""


@pytest.fixture
def write(shared_llm, monkeypatch) -> Iterator[Callable[..., list[SamplingParams]]]:
    """Make every request write a text, and note its parameters. A forced form is noted and not enforced."""
    given: list[SamplingParams] = []
    submit = shared_llm.engine.submit

    def submit_freely(prompt: Any, params: SamplingParams, *rest: Any) -> Any:
        given.append(params)
        return submit(prompt, dataclasses.replace(params, structured_outputs=None), *rest)

    def prepare(text: str, step: int = 5) -> list[SamplingParams]:
        monkeypatch.setattr(shared_llm.tokenizer, "stream", lambda *args: Script(text, step))
        return given

    monkeypatch.setattr(shared_llm.engine, "submit", submit_freely)
    monkeypatch.setattr(type(shared_llm.engine), "grammars", types.SimpleNamespace(guide=lambda language: None))
    yield prepare


def ask(client, **fields: Any) -> Any:
    asked = dict(model="gqa", messages=MESSAGES, tools=TOOLS, max_tokens=100, stop=[END]) | fields
    return client.chat.completions.create(**{name: value for name, value in asked.items() if value is not None})


def streamed(client, **fields: Any) -> tuple[str | None, list[tuple[str, str, str]], str]:
    """Content, calls (id, name, arguments) and finish reason of a stream, put together as clients do."""
    content, calls, reason = None, [], None
    for chunk in ask(client, stream=True, **fields):
        (choice,) = chunk.choices
        if choice.delta.content is not None:
            content = (content or "") + choice.delta.content
        for call in choice.delta.tool_calls or ():
            if call.index == len(calls):
                assert call.type == "function"
                calls.append([call.id, call.function.name, ""])
            else:
                assert call.id is None and call.function.name is None and call.function.arguments
            calls[call.index][2] += call.function.arguments
        reason = choice.finish_reason or reason
    return content, [tuple(call) for call in calls], reason


def test_calls_of_an_answer(client, write):
    write(HERMES)
    (choice,) = ask(client).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    first, second = choice.message.tool_calls
    assert (first.type, first.function.name, json.loads(first.function.arguments)) == ("function", "weather", {"city": "Bern"})
    assert (second.function.name, second.function.arguments) == ("now", "{}") and first.id != second.id


@pytest.mark.parametrize("step", [2, 3, 1000])
def test_calls_of_a_stream(client, write, step):
    write(HERMES, step)
    content, calls, reason = streamed(client)
    assert (content, reason) == ("Let me see.", "tool_calls")
    assert [call[1:] for call in calls] == [("weather", '{"city": "Bern"}'), ("now", "{}")]
    assert all(call[0].startswith("chatcmpl-tool-") for call in calls)


def test_arguments_are_streamed_in_pieces(client, write):
    write(HERMES, 3)
    chunks = list(ask(client, stream=True))
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or () if call.index == 0]
    assert len(pieces) > 3
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content is None


def test_a_call_without_text_has_no_content(client, write):
    write(f"<tool_call>{CALL}</tool_call>")
    assert ask(client).choices[0].message.content is None
    assert streamed(client)[0] is None


def test_an_answer_without_a_call(client, write):
    write("It is <sunny>.")
    (choice,) = ask(client).choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("It is <sunny>.", None, "stop")
    assert streamed(client) == ("It is <sunny>.", [], "stop")


def test_an_answer_that_ends_within_a_call(client, write):
    write(HERMES, 1)
    at = HERMES.index("Bern")
    (choice,) = ask(client, max_tokens=at).choices
    assert choice.finish_reason == "length" and choice.message.tool_calls[0].function.arguments == '{"city": "'
    assert streamed(client, max_tokens=at)[2] == "length"


def test_parallel_tool_calls_false_keeps_the_first_call(client, write):
    write(HERMES)
    assert len(ask(client, parallel_tool_calls=False).choices[0].message.tool_calls) == 1
    assert len(streamed(client, parallel_tool_calls=False)[1]) == 1


def test_choices_have_calls_of_their_own(client, write):
    write(HERMES)
    answer = ask(client, n=2)
    ids = {call.id for choice in answer.choices for call in choice.message.tool_calls}
    assert len(ids) == 4


def test_tool_choice_none_leaves_the_text_as_it_is(client, write, shared_llm, monkeypatch):
    monkeypatch.setattr(shared_llm.tokenizer, "chat_template", ChatTemplate("{{ tools }}", {}))
    write(HERMES)
    answer = ask(client, tool_choice="none")
    assert answer.choices[0].message.content == HERMES and answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len("None")  # the template saw no tools


def test_a_required_call(client, write):
    call = {"name": "weather", "parameters": {"city": "Bern"}}
    given = write(json.dumps([call, {"name": "now", "parameters": {}}]))
    (choice,) = ask(client, tool_choice="required").choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert [call.function.name for call in choice.message.tool_calls] == ["weather", "now"]
    assert [call[1:] for call in streamed(client, tool_choice="required")[1]] == [
        ("weather", '{"city": "Bern"}'),
        ("now", "{}"),
    ]
    assert all("weather" in params.structured_outputs.grammar for params in given) and len(given) == 2


def test_a_named_call(client, write):
    given = write('{"city": "Bern"}')
    choice = {"type": "function", "function": {"name": "weather"}}
    (answer,) = ask(client, tool_choice=choice).choices
    assert answer.message.tool_calls[0].function.name == "weather" and answer.message.content is None
    assert answer.message.tool_calls[0].function.arguments == '{"city": "Bern"}'
    assert answer.finish_reason == "stop"  # as in OpenAI's API
    assert [call[1:] for call in streamed(client, tool_choice=choice)[1]] == [("weather", '{"city": "Bern"}')]
    assert [params.structured_outputs for params in given] == [StructuredOutputsParams(json=PARAMETERS)] * 2


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"tools": None, "tool_choice": "required"}, "tool_choice is 'required'; allowed: only together with tools"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "rain"}}},
            "tool_choice is 'rain'; allowed: a tool of tools: weather, now",
        ),
        ({"tool_choice": "always"}, "tool_choice is 'always'; allowed: none, auto, required or"),
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, r"tools\.0\.function\.name is 'f g'"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls is 'no'"),
    ],
)
def test_choices_that_are_refused(client, fields, error):
    with pytest.raises(openai.BadRequestError, match=error):
        ask(client, **fields)


def test_a_forced_call_excludes_another_form(client, monkeypatch):
    from chameleon_jax.serving.http.requests import Sampling

    make = Sampling.sampling_params
    form = StructuredOutputsParams(regex="a")
    formed = lambda *args: [dataclasses.replace(params, structured_outputs=form) for params in make(*args)]  # noqa: E731
    monkeypatch.setattr(Sampling, "sampling_params", formed)
    with pytest.raises(openai.BadRequestError, match="tool_choice is required; allowed: not together with response_format"):
        ask(client, tool_choice="required")


def test_calls_and_results_come_back_in_the_conversation(client, write, shared_llm, monkeypatch):
    """A template reads arguments as an object, since it writes them as JSON itself."""
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for call in m.tool_calls %}{{ call.function.name }}"
        "{{ call.function.arguments | tojson }}{{ call.id == messages[-1].tool_call_id }}{% endfor %};{% endfor %}"
        "{{ tools[0] | tojson }}"
    )
    monkeypatch.setattr(shared_llm.tokenizer, "chat_template", ChatTemplate(template, {}))
    write(f"<tool_call>{CALL}</tool_call>")
    message = ask(client, tools=[NOW], max_tokens=30).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sun"}
    answer = ask(client, messages=[*MESSAGES, message, result], tools=[NOW], max_tokens=1)
    text = 'user:hi;assistant:weather{"city": "Bern"}True;tool:sun;{"type": "function", "function": {"name": "now"}}'
    assert answer.usage.prompt_tokens == len(text)


@pytest.mark.parametrize("style", STYLES)
def test_a_marker_that_is_a_special_token_stays_in_the_text(client, write, shared_llm, monkeypatch, style):
    monkeypatch.setattr(shared_llm.tokenizer, "is_special", lambda text: text == STYLES[style].marker)
    monkeypatch.setattr(type(shared_llm.tokenizer), "end_tokens", ["<eot>"])
    monkeypatch.setattr(shared_llm.tokenizer, "has_token", lambda text: text == STYLES[style].marker)
    given = write(f"Yes<eot>.{STYLES[style].marker}{CALL}<eot>")
    content, calls, reason = streamed(client)
    assert not given[0].skip_special_tokens
    assert (content, reason) == ("Yes.", "tool_calls") and [call[1:] for call in calls] == [("weather", '{"city": "Bern"}')]
    assert (len(calls[0][0]) == 9) is (style == "mistral")


def test_other_special_tokens_stay_out_of_the_text(client, write):
    given = write("Hi")
    ask(client)
    assert given[0].skip_special_tokens


def test_the_style_of_the_server(shared_llm, write):
    config = ServerConfig(port=0, grpc_port=None, tool_call_parser="mistral")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(shared_llm, config))
        client = stack.enter_context(openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=TIMEOUT))
        write(f"[TOOL_CALLS] [{CALL}]")
        (call,) = ask(client).choices[0].message.tool_calls
        assert call.function.name == "weather" and len(call.id) == 9


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_forced_call_fits_its_tool_whatever_the_model_likes(served, no_spaces, stream, temperature):
    """The model's weights are random, so that only the grammar can make a call of its text."""
    parameters = {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}},
        "required": ["unit"],
        "additionalProperties": False,
    }
    tools: list[Any] = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("cold", "warm")]
    for choice in ("required", {"type": "function", "function": {"name": "warm"}}):
        asked = dict(model="llama2", messages=MESSAGES, tools=tools, tool_choice=choice, parallel_tool_calls=False)
        own = dict(temperature=temperature, seed=3, max_tokens=90, logit_bias=no_spaces, stream=stream)
        answer = served.openai.chat.completions.create(**asked, **own)
        if stream:
            parts = [call for chunk in answer for call in chunk.choices[0].delta.tool_calls or ()]
            name, arguments = parts[0].function.name, "".join(part.function.arguments or "" for part in parts)
        else:
            (call,) = answer.choices[0].message.tool_calls
            name, arguments = call.function.name, call.function.arguments
        assert name in ("cold", "warm") if choice == "required" else name == "warm"
        assert json.loads(arguments) in ({"unit": "C"}, {"unit": "F"})
