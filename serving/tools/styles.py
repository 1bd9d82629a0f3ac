"""Styles in which models write tool calls, by vLLM's names."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable
from typing import ClassVar

from chameleon_jax.serving.tools.call_parser import JSON_HEAD, CallParser


class Llama3JsonParser(CallParser):
    """Calls of Llama 3: `{"name": "f", "parameters": {...}}`, separated by `;`, alone or behind `<|python_tag|>`."""

    marker = "<|python_tag|>"
    openers = "{"
    between = " \t\r\n;,"
    again = True


class HermesParser(CallParser):
    """Calls of Hermes and Qwen: `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`."""

    marker = "<tool_call>"
    between = " \t\r\n}"  # small models close one brace too many
    closing = "</tool_call>"


class MistralParser(CallParser):
    """Calls of Mistral: `[TOOL_CALLS] [{"name": "f", "arguments": {...}}]`, and newer `[TOOL_CALLS]f[ARGS]{...}`."""

    marker = "[TOOL_CALLS]"
    lead = r"\s*\[?\s*"
    head = JSON_HEAD + r"|(?P<plain>[\w.:/-]+)\s*(?:\[CALL_ID\]\w+\s*)?(?:\[ARGS\]\s*)?(?=\{)"
    between = " \t\r\n,]"
    again = True

    _unfinished: ClassVar[re.Pattern[str]] = re.compile(r"[\w.:/-]*\s*(\[[\w\[\]\s]*)?")

    @staticmethod
    def call_id() -> str:
        """Make an id of nine letters and digits, as Mistral's chat templates require."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    def _may_begin(self, text: str) -> bool:
        return self._unfinished.fullmatch(text) is not None


STYLES: dict[str, type[CallParser]] = {"hermes": HermesParser, "mistral": MistralParser, "llama3_json": Llama3JsonParser}


def guess_style(template: str, has_token: Callable[[str], bool]) -> str:
    """Name the style of a model.

    Args:
        template: Chat template.
        has_token: Whether the tokenizer has a token.

    Returns:
        The style whose marker the template has, else the tokenizer; hermes where neither has one.
    """
    for has in (template.__contains__, has_token):
        for name, style in STYLES.items():
            if has(style.marker):
                return name
    return "hermes"
