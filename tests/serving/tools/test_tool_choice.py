"""Forced calls: the form of the answer, as llguidance understands it, and the answer read back."""

from __future__ import annotations

import llguidance
import pytest

from chameleon_jax.serving.tools.styles import HermesParser
from chameleon_jax.serving.tools.tool_choice import Tool, ToolChoice
from tests.serving.tools.answers import read

UNIT = {"$defs": {"X": {"enum": ["C", "F"]}}, "properties": {"unit": {"$ref": "#/$defs/X"}}, "required": ["unit"]}
COUNT = {"$defs": {"X": {"type": "integer"}}, "properties": {"n": {"$ref": "#/$defs/X"}}, "required": ["n"]}
TOOLS = [Tool("weather", UNIT), Tool("count.to", COUNT), Tool("now")]
"""Two of them have definitions of one name."""

WEATHER = '{"name": "weather", "parameters": {"unit": "C"}}'
COUNT_TO = '{"name": "count.to", "parameters": {"n": 5}}'
NOW = '{"name": "now", "parameters": {}}'


def accepts(choice: ToolChoice, text: str) -> bool:
    """Whether the form of an answer allows a whole text."""
    form = choice.structured_outputs()
    if form.json is None:
        grammar = llguidance.grammar_from("lark", form.grammar)
    else:
        grammar = llguidance.grammar_from("json_schema", form.json)
    assert llguidance.LLMatcher.validate_grammar(grammar) == ""
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    return matcher.consume_tokens(tokenizer.tokenize_str(text)) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        (f"[{WEATHER}]", True),
        (f"[{WEATHER}, {COUNT_TO}, {NOW}]", True),
        (f"[{COUNT_TO}]".replace("5", '"C"'), False),
        (f"[{WEATHER}]".replace("weather", "rain"), False),
        (f"[{WEATHER}]".replace('"C"', "5"), False),
        (f"[{NOW}]".replace("{}", '{"a": 1}'), False),
        ("[]", False),
        (WEATHER, False),
        ("Hello.", False),
    ],
)
def test_a_required_choice_allows_an_array_of_calls(text, allowed):
    assert accepts(ToolChoice(HermesParser, TOOLS, "required"), text) is allowed


def test_a_required_choice_without_parallel_calls_allows_one():
    choice = ToolChoice(HermesParser, TOOLS, "required", parallel=False)
    assert accepts(choice, f"[{WEATHER}]") and not accepts(choice, f"[{WEATHER}, {NOW}]")


def test_a_named_choice_allows_the_arguments_of_its_tool():
    choice = ToolChoice(HermesParser, TOOLS[:1], "named")
    assert accepts(choice, '{"unit": "F"}')
    assert not accepts(choice, '{"n": 5}') and not accepts(choice, WEATHER) and not accepts(choice, "[]")
    assert accepts(ToolChoice(HermesParser, TOOLS[2:], "named"), "{}")


def test_an_automatic_choice_forces_nothing():
    assert ToolChoice(HermesParser, TOOLS).structured_outputs() is None


def test_forced_calls_are_read_back():
    text = f"[{WEATHER}, {NOW}]"
    expected = ("", [("weather", '{"unit": "C"}'), ("now", "{}")])
    for pieces in ([text], [*text, ""]):
        assert read(ToolChoice(HermesParser, TOOLS, "required").parser(), pieces) == expected
        assert read(ToolChoice(HermesParser, TOOLS, "required", parallel=False).parser(), pieces) == ("", expected[1][:1])
        named = ToolChoice(HermesParser, TOOLS[:1], "named").parser()
        assert read(named, pieces) == ("", [("weather", text)])


@pytest.mark.parametrize(
    ("mode", "reason", "called", "expected"),
    [
        ("auto", "stop", True, "tool_calls"),
        ("auto", "stop", False, "stop"),
        ("auto", "length", True, "length"),
        ("auto", None, True, None),
        ("required", "stop", True, "tool_calls"),
        ("named", "stop", True, "stop"),
    ],
)
def test_finish_reasons(mode, reason, called, expected):
    assert ToolChoice(HermesParser, TOOLS, mode).finish_reason(reason, called) == expected
