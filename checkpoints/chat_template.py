"""Chat templates of checkpoints, rendered in a sandbox with the names that transformers gives templates."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from chameleon_jax.checkpoints.json_file import read_json

_END = "END-OF-THE-FINAL-MESSAGE "
"""Marks the end of a message that is continued; the space shows whether the template trims messages."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients send a message's reasoning. Most templates read the first; gpt-oss' templates read the second."""


class ChatTemplate:
    """Template that renders a conversation as the text the model was trained on.

    Args:
        source: the template, or several by name, of which "default" is used, and "tool_use" where there are tools. None or
            empty: no template.
        special_tokens: variables of the template.
        place: file or field of the source, for errors.

    Attributes:
        error: reason why no conversation can be rendered; None where one can.
        text: source of every template in use.
    """

    def __init__(self, source: Any, special_tokens: Mapping[str, str], place: str = "chat_template"):
        self._special_tokens = dict(special_tokens)
        self._templates: dict[str, jinja2.Template] = {}
        self.error: str | None = None
        self.text = ""
        try:
            sources = _sources(source, place)
            self._templates = {name: _compile(text, place) for name, (text, place) in sources.items()}
            self.text = "".join(text for text, _ in sources.values())
        except ValueError as error:
            self.error = str(error)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """Render a conversation; raise ValueError where there is no template or it refuses the messages."""
        if self.error is not None:
            raise ValueError(f"messages: {self.error}")
        template = self._templates.get("tool_use" if variables.get("tools") else "default", self._templates["default"])
        chat = [_plain(message) for message in messages]
        final = _mark_end(chat) if continue_final_message else ""
        given = {"messages": chat, "add_generation_prompt": add_generation_prompt}
        try:
            text = template.render({"tools": None, "documents": None} | self._special_tokens | dict(variables) | given)
        except Exception as error:  # a template is a program: on messages it does not expect it may raise anything
            raise ValueError(f"messages: the chat template refuses them: {error}") from error
        return _cut_at_end(text, final) if continue_final_message else text


def read_chat_template(directory: Path, settings: Mapping[str, Any]) -> tuple[Any, str]:
    """Find the template of a checkpoint: in a file of its own, else in `tokenizer_config.json`.

    Args:
        directory: the checkpoint.
        settings: content of its `tokenizer_config.json`.

    Returns:
        The `source` and the `place` of a `ChatTemplate`.

    Raises:
        ValueError: a file is broken; names it.
    """
    named = directory / "additional_chat_templates"
    for file in (named / "default.jinja", directory / "chat_template.jinja"):
        if file.is_file():
            source, tool_use = _read_text(file), named / "tool_use.jinja"
            return ({"default": source, "tool_use": _read_text(tool_use)} if tool_use.is_file() else source), str(file)
    if settings.get("chat_template"):
        return settings["chat_template"], f"chat_template of {directory / 'tokenizer_config.json'}"
    file = directory / "chat_template.json"  # of processors, which text models rarely have
    return read_json(file, missing_ok=True).get("chat_template"), str(file)


def operators_template(given: str) -> tuple[str, str]:
    """Read a template that is given as a file or as text, which has a brace or a line break.

    Returns:
        The `source` and the `place` of a `ChatTemplate`.

    Raises:
        ValueError: there is no such file, or it is no text.
    """
    if set("{}\n") & set(given):
        return given, "its text"
    if not Path(given).is_file():
        raise ValueError(f"chat_template is {given!r}; allowed: a file, or the text of a template")
    return _read_text(Path(given)), given


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Collect special tokens by name: the fields of `tokenizer_config.json` that end in `_token`, and a model's own."""
    named = {name: token for name, token in settings.items() if name.endswith("_token")}
    for field in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(settings.get(field), Mapping):
            named |= settings[field]
    return {name: text for name, token in named.items() if (text := token_text(token)) is not None}


def token_text(token: Any) -> str | None:
    """Text of a special token, given as text or with options; None for anything else (`add_bos_token` is a flag)."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _sources(source: Any, place: str) -> dict[str, tuple[Any, str]]:
    """Find the templates in use, each with its place, by name; raise ValueError where there is no default."""
    if not source:
        raise ValueError("the tokenizer has no chat_template")
    if isinstance(source, list):
        try:
            source = {entry["name"]: entry["template"] for entry in source}
        except Exception as error:
            raise ValueError(f"the chat template cannot be compiled: {place}: {error!r}") from error
    if not isinstance(source, Mapping):
        return {"default": (source, place)}
    if "default" not in source:
        raise ValueError(f"{place} has the chat templates {', '.join(sorted(source))}; allowed: default among them")
    places = {"default": place, "tool_use": f"tool_use of {place}"}
    return {name: (source[name], places[name]) for name in places if name in source}


def _compile(source: Any, place: str) -> jinja2.Template:
    """Compile a template; raise ValueError where it is broken."""
    try:
        return _ENVIRONMENT.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template cannot be compiled: {place}, line {error.lineno}: {error.message}") from error
    except Exception as error:  # the source is no text, or Python's compiler refuses it
        raise ValueError(f"the chat template cannot be compiled: {place}: {error!r}") from error


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a message without fields that are None, which templates do not expect."""
    plain = {name: value for name, value in message.items() if value is not None}
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning} | plain | {"reasoning_content": reasoning}


def _mark_end(chat: list[dict[str, Any]]) -> str:
    """Mark the end of the last message's text and return the text; raise ValueError where it has none."""
    final = chat[-1].get("content") if chat else None
    if not isinstance(final, str):
        raise ValueError("continue_final_message is set; allowed: only where the last message has text")
    chat[-1]["content"] = final + _END
    return final


def _cut_at_end(text: str, final: str) -> str:
    end = text.rfind(_END.strip())
    if end < 0 or final.strip() not in text[:end]:
        raise ValueError("continue_final_message is set, but the chat template does not keep the last message as it is")
    return text[:end] if text.startswith(_END, end) else text[:end].rstrip()


# -- the environment of templates -------------------------------------------------------------------------------------------


class _Generation(Extension):
    """The block `{% generation %}...{% endgeneration %}`, which marks text of the model for training."""

    tags = {"generation"}  # noqa: RUF012 (jinja reads it from the class)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """`namespace` that refuses names with a leading underscore, since Python gives some of them a meaning."""

    def __init__(self, /, *args: Any, **attributes: Any):
        attributes = dict(*args, **attributes)
        for name in attributes:
            _check_name(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}: it begins with an underscore")


class _Dict:
    """`dict` without the methods that change one, which the sandbox does not see as `dict.update(message, ...)`."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
)
_ENVIRONMENT.filters["tojson"] = _tojson
_ENVIRONMENT.globals |= {
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
    "namespace": _Namespace,
    "dict": _Dict(),
}
