"""Calls in each style, whole, in pieces of any size, and not well-formed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.serving.tools.styles import STYLES, guess_style
from chameleon_jax.serving.tools.tool_choice import ArrayParser
from tests.properties import examples
from tests.serving.tools.answers import Read, read

PARSERS = STYLES | {"array": ArrayParser}

CASES: list[tuple[str, str, Read]] = [
    # answers without a call
    *[(name, text, (text, [])) for name in PARSERS for text in ("", "  \n", "Hello.\n", " a < b [c] ", "€ <tool [TOOL_ <|py")],
    # hermes
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', ("", [("f", '{"a": 1}')])),
    (
        "hermes",
        'Let me see.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n'
        '{"name": "g", "arguments": {"x": "</tool_call> }{\\"", "y": [{}]}}\n</tool_call>\n',
        ("Let me see.", [("f", "{}"), ("g", '{"x": "</tool_call> }{\\"", "y": [{}]}')]),
    ),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a":"é\\u00e9\n"}}</tool_call>', ("", [("f", '{"a":"é\\u00e9\n"}')])),
    ("hermes", '<tool_call>{"arguments": {"a": "é"}, "name": "f"}</tool_call> Done.', ("Done.", [("f", '{"a": "é"}')])),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", [("f", '{"a": 1}')])),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', ("", [("f", "{}")])),
    ("hermes", '<tool_call>{"name": "a \\"b\\"", "arguments": {}}</tool_call>', ("", [('a "b"', "{}")])),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}}\n</tool_call>', ("", [("f", '{"a": 1}')])),  # one too many
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>', ("", [("f", '{"a": 1}')])),  # one too few
    ("hermes", '<tool_call>{"name": "f", "arguments": {}, "id": "}"}</tool_call>', ("", [("f", "{}")])),
    ("hermes", 'So <tool_call>{"name": "f", "arguments": {"a": "b', ("So", [("f", '{"a": "b')])),  # cut off
    ("hermes", 'So <tool_call>{"name": "f", "argu', ('So <tool_call>{"name": "f", "argu', [])),
    ("hermes", "a\n<tool_call>b</tool_call> c", ("a\n<tool_call>b</tool_call> c", [])),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}', ('<tool_call>{"name": 5, "arguments": {}}', [])),
    ("hermes", '<tool_call>{"name": "f"}', ('<tool_call>{"name": "f"}', [])),
    # escapes that JSON does not have, and lone surrogates, which no answer can hold
    *[
        (style, text, (text, []))
        for name in ("get\\_weather", "a\\ud83d", "a\\u12", "x" * 300 + "\\q")
        for style, text in [
            ("hermes", f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>'),
            ("llama3_json", f'{{"name": "{name}", "parameters": {{}}}}'),
        ]
    ],
    ("hermes", '<tool_call>{"arguments": {"x": "\\ud83d"}, "name": "f"}</tool_call>', ("", [("f", '{"x": "\\ud83d"}')])),
    ("hermes", '<tool_call><tool_call>{"name": "f", "arguments": {}}', ("<tool_call>", [("f", "{}")])),
    ("hermes", '{"name": "f", "arguments": {}}', ('{"name": "f", "arguments": {}}', [])),
    # llama3_json
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', ("", [("f", '{"a": 1}')])),
    ("llama3_json", '\n\n<|python_tag|>{"name": "f", "arguments": {}}', ("", [("f", "{}")])),
    ("llama3_json", '{"type": "function", "name": "f", "parameters": {}}', ("", [("f", "{}")])),
    (
        "llama3_json",
        '{"name": "f", "parameters": {"a": ";"}}; {"name": "g", "parameters": {}}\n{"name": "h", "parameters": {}}',
        ("", [("f", '{"a": ";"}'), ("g", "{}"), ("h", "{}")]),
    ),
    ("llama3_json", '{"name": "f", "parameters": {}} Well.', ("Well.", [("f", "{}")])),
    ("llama3_json", '{"name": "f", "parameters": {}}; {"b": 1}', ('{"b": 1}', [("f", "{}")])),
    (
        "llama3_json",
        ' {"city": "x"} is {"name": "f", "parameters": {}}',
        (' {"city": "x"} is {"name": "f", "parameters": {}}', []),
    ),
    ("llama3_json", 'I call <|python_tag|>{"name": "f", "parameters": {}}', ("I call", [("f", "{}")])),
    ("llama3_json", '<|python_tag|>f.call(x="y")', ('<|python_tag|>f.call(x="y")', [])),
    ("llama3_json", "{" * 5000, ("{" * 5000, [])),
    # mistral
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}}]', ("", [("f", '{"a": [1]}')])),
    (
        "mistral",
        'See: [TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abc"}, {"arguments": {"b": "]"}, "name": "g"}] ok',
        ("See:ok", [("f", "{}"), ("g", '{"b": "]"}')]),
    ),
    ("mistral", '[TOOL_CALLS]f{"a": 1}', ("", [("f", '{"a": 1}')])),
    (
        "mistral",
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g.h-i[CALL_ID]abc123def[ARGS]{}',
        ("", [("f", '{"a": 1}'), ("g.h-i", "{}")]),
    ),
    ("mistral", "[TOOL_CALLS] I cannot.", ("[TOOL_CALLS] I cannot.", [])),
    ("mistral", "[TOOL_CALLS]f[ARGS]", ("[TOOL_CALLS]f[ARGS]", [])),
    ("mistral", "[TOOL_CALLS] [1, 2]", ("[TOOL_CALLS] [1, 2]", [])),
    # forced calls
    (
        "array",
        '[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}]',
        ("", [("f", '{"a": 1}'), ("g", "{}")]),
    ),
    ("array", '[{"name": "f", "parame', ('[{"name": "f", "parame', [])),  # cut off
    ("array", '[{"name": "f", "parameters": {"a', ("", [("f", '{"a')])),
]


@pytest.mark.parametrize(("style", "text", "expected"), CASES)
def test_answers(style, text, expected):
    assert read(PARSERS[style](), [text]) == expected
    assert read(PARSERS[style](), [*text, ""]) == expected


@pytest.mark.parametrize(("style", "text", "expected"), [case for case in CASES if len(case[1]) < 1000])
@examples(25)
@given(data=st.data())
def test_pieces_of_any_size_give_the_same_answer(style, text, expected, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)])]
    assert read(PARSERS[style](), pieces) == expected


MARKUP = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<eos>", '{"name": "f", ', '"arguments": ']
MARKUP += ['"parameters": ', "{}", "}", "{", "[", "]", '"', "\\", ";", ",", " ", "\n", "f", "é"]


@pytest.mark.parametrize("style", PARSERS)
@given(parts=st.lists(st.sampled_from(MARKUP), max_size=12), cuts=st.lists(st.integers(0, 120), max_size=8))
def test_any_text_is_read_the_same_in_any_pieces(style, parts, cuts):
    text = "".join(parts)
    cuts = sorted(cuts)
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)])]
    assert read(PARSERS[style](["<eos>"]), pieces) == read(PARSERS[style](["<eos>"]), [text])


def test_text_and_arguments_are_passed_on_as_they_come():
    parser = STYLES["hermes"]()
    pieces = ["Let me ", "see. <", 'b <tool_call>{"name": "f", "arg', 'uments": {"a"', ": 1", "}}</tool_", "call>"]
    parsed = [parser.feed(piece) for piece in pieces]
    assert [part.content for part in parsed] == ["Let me", " see.", " <b", "", "", "", ""]
    calls = [[(call.name, call.arguments) for call in part.calls] for part in parsed]
    assert calls == [[], [], [], [("f", '{"a"')], [(None, ": 1")], [(None, "}")], []]


def test_hidden_tokens_are_left_out_of_the_content():
    text = 'Hi<eos> you <tool_call>{"name": "f", "arguments": {"a": "<eos>"}}</tool_call><eos>'
    assert read(STYLES["hermes"](["<eos>"]), [text]) == ("Hi you", [("f", '{"a": "<eos>"}')])


def test_only_the_first_calls_are_kept():
    text = '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}'
    assert read(STYLES["llama3_json"](max_calls=1), [text]) == ("", [("f", "{}")])


def test_ids_of_calls():
    for name, style in STYLES.items():
        ids = {style.call_id() for _ in range(100)}
        assert len(ids) == 100
        assert (
            all(len(i) == 9 and i.isalnum() for i in ids)
            if name == "mistral"
            else all(i.startswith("chatcmpl-tool-") for i in ids)
        )


@pytest.mark.parametrize(
    ("template", "tokens", "style"),
    [
        ("{{ '<tool_call>' }}", (), "hermes"),
        ("{{ '[TOOL_CALLS]' }}", (), "mistral"),
        ("{{ '<|python_tag|>' }}", (), "llama3_json"),
        ("{{ '<tool_call>' }}", ("<|python_tag|>",), "hermes"),
        ("chat", ("<|python_tag|>",), "llama3_json"),
        ("chat", ("[TOOL_CALLS]",), "mistral"),
        ("chat", (), "hermes"),
    ],
)
def test_the_style_is_guessed_from_template_and_tokens(template, tokens, style):
    assert guess_style(template, tokens.__contains__) == style
