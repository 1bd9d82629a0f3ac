from __future__ import annotations

import json

import jinja2.environment
import pytest

from chameleon_jax.checkpoints.chat_template import ChatTemplate, special_tokens
from chameleon_jax.checkpoints.tokenizer import Tokenizer
from tests.checkpoints import samples
from tests.checkpoints.chat_templates import CASES, CHATML, MESSAGES, SPECIAL_TOKENS, Case

BACKEND = samples.byte_level().backend
USER = [{"role": "user", "content": "hi"}]
CONTINUED = {"add_generation_prompt": False, "continue_final_message": True}


@pytest.mark.parametrize("case", CASES)
def test_a_template_gives_the_text_that_transformers_gives(case: Case):
    tokenizer = Tokenizer(BACKEND, SPECIAL_TOKENS | {"chat_template": case.template})
    if case.text is None:
        with pytest.raises(ValueError, match="messages|continue_final_message"):
            tokenizer.apply_chat_template(case.messages, **case.options)
    else:
        assert tokenizer.apply_chat_template(case.messages, **case.options) == case.text


def test_the_messages_are_left_as_they_were():
    before = json.dumps(MESSAGES)
    Tokenizer(BACKEND, {"chat_template": CHATML}).apply_chat_template(MESSAGES, **CONTINUED)
    assert json.dumps(MESSAGES) == before


def test_a_template_is_compiled_once(monkeypatch):
    tokenizer = Tokenizer(BACKEND, {"chat_template": "{{ messages[0].content }}"})
    monkeypatch.setattr(jinja2.environment.Environment, "compile", None)
    assert [tokenizer.apply_chat_template(USER) for _ in range(2)] == ["hi", "hi"]


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (None, "the tokenizer has no chat_template"),
        ("", "the tokenizer has no chat_template"),
        ([], "the tokenizer has no chat_template"),
        ("a\nb\n{% for", "place, line 3: unexpected 'end of template'"),
        ("a\n{{ x | nonsense }}", "place, line 2: No filter named 'nonsense'"),
        ([{"name": "default", "template": "\n{{"}], "place, line 2: unexpected 'end of template'"),
        (
            [{"name": "tool_use", "template": "x"}, {"name": "rag", "template": "x"}],
            "place has the chat templates rag, tool_use",
        ),
        ([{"template": "x"}], "place: KeyError('name')"),
        ([5], "place: TypeError"),
        ({"default": None}, "place: "),
        (5, "place: "),
    ],
)
def test_a_template_that_cannot_be_used_says_where_and_why(source, error):
    template = ChatTemplate(source, {}, "place")
    assert template.error is not None and error in template.error
    with pytest.raises(ValueError, match="^messages: ") as raised:
        template.render(USER, True, False, {})
    assert str(raised.value) == f"messages: {template.error}"


@pytest.mark.parametrize(
    "source", ["default", {"default": "default", "tool_use": "no"}, [{"name": "default", "template": "default"}]]
)
def test_the_template_named_default_is_taken(source):
    template = ChatTemplate(source, {})
    assert template.error is None and template.render(USER, True, False, {}) == "default"


def test_the_template_named_tool_use_is_taken_where_there_are_tools(directory):
    tools = {"tools": [{"type": "function"}]}
    named = [{"name": "default", "template": "default"}, {"name": "tool_use", "template": "{{ tools | length }}"}]
    template = ChatTemplate(named, {}, "place")
    assert template.render(USER, True, False, {"tools": None}) == template.render(USER, True, False, {}) == "default"
    assert template.render(USER, True, False, tools) == "1"
    tokenizer = Tokenizer.from_directory(directory({JINJA: "jinja", f"{NAMED}/tool_use.jinja": "tools"}))
    assert tokenizer.apply_chat_template(USER, **tools) == "tools"
    broken = ChatTemplate({"default": "x", "tool_use": "\n{%"}, {}, "place")
    assert "tool_use of place, line 2" in broken.error


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        ([], CONTINUED),
        ([{"role": "assistant", "content": None}], CONTINUED),
        ([{"role": "assistant", "content": "x" * 50}], CONTINUED),  # the template cuts it off
    ],
)
def test_a_last_message_that_cannot_be_continued(messages, options):
    tokenizer = Tokenizer(BACKEND, {"chat_template": "{{ messages[-1].content[:40] }}"})
    with pytest.raises(ValueError, match="continue_final_message"):
        tokenizer.apply_chat_template(messages, **options)


TOKEN = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        (
            {"bos_token": "<s>", "pad_token": None, "add_bos_token": True, "fim_token": "<fim>"},
            {"bos_token": "<s>", "fim_token": "<fim>"},
        ),
        ({"bos_token": TOKEN, "additional_special_tokens": ["<img>"]}, {"bos_token": "<s>"}),
        ({"bos_token": TOKEN, "extra_special_tokens": {"image_token": "<img>"}}, {"bos_token": "<s>", "image_token": "<img>"}),
        ({"extra_special_tokens": {"image_token": TOKEN}}, {"image_token": "<s>"}),
        ({"extra_special_tokens": ["<img>"], "model_specific_special_tokens": {"a_token": "<a>"}}, {"a_token": "<a>"}),
        ({"bos_token": {}, "eos_token": 5, "model_max_length": 10}, {}),
    ],
)
def test_special_tokens_by_name(settings, tokens):
    assert special_tokens(settings) == tokens
    text = "{{ bos_token }}|{{ fim_token }}|{{ add_bos_token is defined }}|{{ image_token }}|{{ a_token }}"
    expected = [
        tokens.get("bos_token", ""),
        tokens.get("fim_token", ""),
        "False",
        tokens.get("image_token", ""),
        tokens.get("a_token", ""),
    ]
    assert Tokenizer(BACKEND, settings | {"chat_template": text}).apply_chat_template(USER) == "|".join(expected)


@pytest.fixture
def directory(tmp_path):
    """Save a tokenizer and return a function that writes files beside it, given as names and contents."""
    BACKEND.save(str(tmp_path / "tokenizer.json"))

    def write(files: dict[str, object]):
        for name, content in files.items():
            file = tmp_path / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return tmp_path

    return write


CONFIG, JINJA, NAMED = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({CONFIG: {"chat_template": "config"}}, "config"),
        ({CONFIG: {"chat_template": {"default": "config", "rag": "no"}}}, "config"),
        ({CONFIG: {"chat_template": "config"}, JINJA: "jinja"}, "jinja"),
        ({JINJA: "Grüße\r\n\n"}, "Grüße\n"),
        ({JINJA: "jinja", f"{NAMED}/tool_use.jinja": "no"}, "jinja"),
        ({JINJA: "jinja", f"{NAMED}/default.jinja": "named"}, "named"),
        ({JINJA: "jinja", f"{NAMED}/default.jinja": "named", f"{NAMED}/tool_use.jinja": "no"}, "named"),
        ({CONFIG: {"chat_template": "config"}, f"{NAMED}/tool_use.jinja": "no"}, "config"),  # transformers refuses it
        ({"chat_template.json": {"chat_template": "json"}}, "json"),  # transformers reads it for processors
        ({CONFIG: {"chat_template": "config"}, "chat_template.json": {"chat_template": "json"}}, "config"),
    ],
)
def test_files_that_hold_the_template(directory, files, text):
    assert Tokenizer.from_directory(directory(files)).apply_chat_template(USER) == text


@pytest.mark.parametrize(
    ("files", "place"),
    [
        ({JINJA: "\n{%"}, "chat_template.jinja, line 2"),
        ({CONFIG: {"chat_template": "\n{%"}}, "tokenizer_config.json, line 2"),
        ({"chat_template.json": {"chat_template": "\n{%"}}, "chat_template.json, line 2"),
    ],
)
def test_a_template_that_cannot_be_compiled_names_its_file_and_line(directory, files, place):
    tokenizer = Tokenizer.from_directory(directory(files))
    assert place in tokenizer.chat_template.error and tokenizer.encode("hell")


def test_special_tokens_in_a_file_of_their_own(directory):
    files = {CONFIG: {"bos_token": "<unk>"}, JINJA: "{{ bos_token }}{{ eos_token }}"}
    files["special_tokens_map.json"] = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    tokenizer = Tokenizer.from_directory(directory(files))
    assert tokenizer.apply_chat_template(USER) == "<s></s>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    files[CONFIG] = {"bos_token": "<unk>", "added_tokens_decoder": {"0": {"content": "<unk>"}}}
    tokenizer = Tokenizer.from_directory(directory(files))
    assert tokenizer.apply_chat_template(USER) == "<unk>" and tokenizer.eos_token_ids == ()


@pytest.mark.parametrize("name", [CONFIG, "special_tokens_map.json", "chat_template.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_a_broken_file_is_named(directory, name, content):
    folder = directory({})
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=name):
        Tokenizer.from_directory(folder)


def test_a_template_that_is_not_utf_8_is_named(directory):
    folder = directory({})
    (folder / JINJA).write_bytes(b"\xff")
    with pytest.raises(ValueError, match="chat_template.jinja is not UTF-8"):
        Tokenizer.from_directory(folder)
