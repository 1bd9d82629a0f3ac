"""Reading of tool calls out of a model's text, piece by piece."""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

from chameleon_jax.serving.tools.bracket_scanner import BracketScanner

JSON_HEAD = (
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*(?P<quoted>"(?:[^"\\]|\\["\\/bfnrtu]){0,256}")\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
"""Usual start of a call, up to its arguments. Calls with other keys or in another order are read once they are complete."""


@dataclasses.dataclass(frozen=True)
class CallPiece:
    """Part of a tool call.

    Attributes:
        index: Place of the call among the calls of the answer, from 0.
        name: Name of the tool in the first part of a call, None in the others.
        arguments: Further characters of the arguments, which are a JSON object.
    """

    index: int
    name: str | None
    arguments: str


class Parsed(NamedTuple):
    """Content and parts of calls that became certain, at most one part for each call."""

    content: str
    calls: list[CallPiece]


class OutputParser(ABC):
    """Parser of one answer. The pieces in which the text comes make no difference to the joined result."""

    @abstractmethod
    def feed(self, text: str, final: bool = False) -> Parsed:
        """Read on. Args: text: next piece of the answer. final: whether it is the last."""


class CallParser(OutputParser):
    """Parser of the calls that a style of model writes among its text.

    White space around calls is dropped. A call that is not well-formed is content, as the model wrote it. Arguments that have
    begun are passed on, even where the answer ends within them.

    Args:
        hidden: Special tokens to leave out of the content.
        max_calls: Further calls are dropped. None keeps all.

    Attributes:
        marker: Text before calls. Empty where calls stand alone.
        openers: First characters of an answer that is a call without a marker.
        lead: Pattern between the marker and the first call.
        head: Pattern from the start of a call to its arguments.
        between: Characters that are dropped behind a call.
        closing: Text behind each call.
        again: Whether another call may follow without a marker.
    """

    marker: ClassVar[str] = ""
    openers: ClassVar[str] = ""
    lead: ClassVar[str] = r"\s*"
    head: ClassVar[str] = JSON_HEAD
    between: ClassVar[str] = " \t\r\n"
    closing: ClassVar[str] = ""
    again: ClassVar[bool] = False

    def __init__(self, hidden: Sequence[str] = (), max_calls: int | None = None):
        self._markers = [marker for marker in (self.marker, *hidden) if marker]
        self._lead = re.compile(rf"(\s*{re.escape(self.marker)})?{self.lead}")
        self._head = re.compile(self.head)
        self._max_calls = max_calls
        self._num_calls = 0
        self._at_start = bool(self.openers)
        self._text = ""  # not read yet
        self._final = False
        self._read: Callable[[], bool] = self._read_content
        self._after_arguments = self._read_between
        self._scanner = BracketScanner()
        self._scanned = 0  # characters of an incomplete call that the scanner has seen
        self._content: list[str] = []
        self._calls: dict[int, CallPiece] = {}

    @staticmethod
    def call_id() -> str:
        """Make an id for a call."""
        return f"chatcmpl-tool-{uuid.uuid4().hex}"

    def feed(self, text: str, final: bool = False) -> Parsed:
        self._text += text
        self._final = final
        while self._read():
            pass
        parsed = Parsed("".join(self._content), list(self._calls.values()))
        self._content, self._calls = [], {}
        return parsed

    # -- states: each reads on from the start of `_text`, and returns False where it waits for more -------------------------

    def _read_content(self) -> bool:
        if self._at_start:
            begin = self._text.lstrip()
            if not begin and not self._final:
                return False
            self._at_start = False
            if begin and begin[0] in self.openers:
                return self._begin_head()
        found = [(at, marker) for marker in self._markers if (at := self._text.find(marker)) >= 0]
        if not found:
            self._say(len(self._text) if self._final else self._certain())
            return False
        at, marker = min(found)  # the first in the text
        if marker != self.marker:
            self._say(at)
            self._text = self._text[len(marker) :]
            return True
        self._say(len(self._text[:at].rstrip()))
        return self._begin_head()

    def _read_head(self) -> bool:
        lead = self._lead.match(self._text)
        assert lead is not None
        begin = lead.end()
        head = self._head.match(self._text, begin)
        if head is not None:
            wrapped = head["quoted"] is not None
            name = _name_of(head["quoted"]) if wrapped else head["plain"]
            if name is None:
                return self._reject(lead)
            self._begin_call(name)
            self._text = self._text[head.end() :]
            self._after_arguments = self._read_wrapper if wrapped else self._read_between
            self._scanner = BracketScanner()
            self._read = self._read_arguments
            return True
        if self._text.startswith("{", begin):
            end = self._scanner.end(self._text[max(begin, self._scanned) :])
            if end is not None:
                return self._read_whole(lead, max(begin, self._scanned) + end)
            self._scanned = len(self._text)
            waits = True
        else:
            waits = self._may_begin(self._text[begin:])
        if waits and not self._final:
            return False
        return self._reject(lead)

    def _read_whole(self, lead: re.Match[str], end: int) -> bool:
        """Read a complete call, whose keys are in any order."""
        call = _call_of(self._text[lead.end() : end])
        if call is None:
            return self._reject(lead)
        name, arguments = call
        self._begin_call(name)
        self._add_arguments(arguments)
        self._text = self._text[end:]
        self._read = self._read_between
        return True

    def _read_arguments(self) -> bool:
        end = self._scanner.end(self._text)
        self._add_arguments(self._text[:end])
        self._text = "" if end is None else self._text[end:]
        if end is not None:
            self._read = self._after_arguments
        return end is not None

    def _read_wrapper(self) -> bool:
        """Drop the rest of the object that holds the arguments. Small models forget its brace."""
        self._text = self._text.lstrip()
        if self._text.startswith(","):
            self._scanner = BracketScanner(depth=1)
            self._read = self._read_other_keys
        elif self._text:
            self._text = self._text.removeprefix("}")
            self._read = self._read_between
        return bool(self._text)

    def _read_other_keys(self) -> bool:
        end = self._scanner.end(self._text)
        self._text = "" if end is None else self._text[end:]
        if end is not None:
            self._read = self._read_between
        return end is not None

    def _read_between(self) -> bool:
        self._text = self._text.lstrip(self.between)
        if self.closing and self._text.startswith(self.closing):
            self._text = self._text[len(self.closing) :]
            return True
        if not self._text or (not self._final and self.closing.startswith(self._text)):
            return False
        if self.again and self._text[0] == "{":
            return self._begin_head()
        self._read = self._read_content
        return True

    # -- parts --------------------------------------------------------------------------------------------------------------

    def _begin_head(self) -> bool:
        self._scanner, self._scanned = BracketScanner(), 0
        self._read = self._read_head
        return True

    def _may_begin(self, text: str) -> bool:
        """Whether text that does not begin with a brace may become a call."""
        return not text

    def _reject(self, lead: re.Match[str]) -> bool:
        """Pass the start of a call that is not well-formed on as content."""
        self._say(lead.end(1) if lead[1] else lead.end() + 1)
        self._read = self._read_content
        return True

    def _certain(self) -> int:
        """Length of the text in front of white space, and of characters that may be the start of a marker."""
        longest = max(map(len, self._markers), default=1) - 1
        starts = (at for at in range(max(0, len(self._text) - longest), len(self._text)) if self._may_be_marker(at))
        return len(self._text[: next(starts, len(self._text))].rstrip())

    def _may_be_marker(self, at: int) -> bool:
        return any(marker.startswith(self._text[at:]) for marker in self._markers)

    def _say(self, end: int) -> None:
        self._content.append(self._text[:end])
        self._text = self._text[end:]

    def _begin_call(self, name: str) -> None:
        self._num_calls += 1
        self._add(CallPiece(self._num_calls - 1, name, ""))

    def _add_arguments(self, text: str) -> None:
        index = self._num_calls - 1
        before = self._calls.get(index, CallPiece(index, None, ""))
        if text:
            self._add(dataclasses.replace(before, arguments=before.arguments + text))

    def _add(self, piece: CallPiece) -> None:
        if self._max_calls is None or piece.index < self._max_calls:
            self._calls[piece.index] = piece


def _name_of(quoted: str) -> str | None:
    """Name in a JSON string; None where it is none that an answer can hold."""
    try:
        name: str = json.loads(quoted, strict=False)
    except ValueError:
        return None
    return name if _is_text(name) else None


def _is_text(value: Any) -> bool:
    """Whether a value is a text without lone surrogates, which JSON can name and UTF-8 cannot encode."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _call_of(text: str) -> tuple[str, str] | None:
    """Name and arguments of a complete call; None where the text is no call."""
    try:
        call: Any = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    if not _is_text(call.get("name")) or not call.keys() & {"arguments", "parameters"}:
        return None
    arguments = call.get("arguments", call.get("parameters"))
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, str):
        plain = json.dumps(arguments, ensure_ascii=False)
        arguments = plain if _is_text(plain) else json.dumps(arguments)
    return (call["name"], arguments) if _is_text(arguments) else None
