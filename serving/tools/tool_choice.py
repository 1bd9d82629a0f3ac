"""Choice between calling tools and answering: the form that it gives an answer, and the parser that reads the answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from chameleon_jax.sampling_params import StructuredOutputsParams
from chameleon_jax.serving.tools.call_parser import CallParser, CallPiece, OutputParser, Parsed

NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""JSON schema of a tool that takes nothing."""


class Tool(NamedTuple):
    """Function that a model may call. `parameters` is the JSON schema of its arguments, None where it takes none."""

    name: str
    parameters: Mapping[str, Any] | None = None

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "object", **(self.parameters or NO_PARAMETERS)}


@dataclasses.dataclass(frozen=True)
class ToolChoice:
    """Tools of one request, and whether its answer must call one.

    Attributes:
        style: Parser of the calls that the model writes unasked.
        tools: Tools that may be called.
        mode: "auto" leaves it to the model, "required" forces one call or more, "named" forces the call of the only tool.
        parallel: Whether an answer may have several calls.
    """

    style: type[CallParser]
    tools: Sequence[Tool]
    mode: Literal["auto", "required", "named"] = "auto"
    parallel: bool = True

    def structured_outputs(self) -> StructuredOutputsParams | None:
        """Form of a forced answer, None where the model may choose.

        As in vLLM, a required choice is a JSON array of calls in every style, and a named one is the call's arguments.
        """
        if self.mode == "auto":
            return None
        if self.mode == "named":
            return StructuredOutputsParams(json=self.tools[0].schema)
        return StructuredOutputsParams(grammar=_array_grammar(self.tools, self.parallel))

    def parser(self, hidden: Sequence[str] = ()) -> OutputParser:
        """Make the parser of one answer. Args: hidden: special tokens to leave out of the content."""
        if self.mode == "named":
            return ArgumentsParser(self.tools[0].name)
        style = self.style if self.mode == "auto" else ArrayParser
        return style(hidden, max_calls=None if self.parallel else 1)

    def finish_reason(self, reason: str | None, called: bool) -> str | None:
        """Reason for which an answer ended. A named call ends with "stop", as in OpenAI's API."""
        return "tool_calls" if reason == "stop" and called and self.mode != "named" else reason


class ArrayParser(CallParser):
    """Parser of a JSON array of calls."""

    openers = "[{"
    lead = r"\s*\[?\s*"
    between = " \t\r\n,]"
    again = True


class ArgumentsParser(OutputParser):
    """Parser of an answer that is the arguments of one call.

    Args:
        name: Name of the tool.
    """

    def __init__(self, name: str):
        self._name: str | None = name

    def feed(self, text: str, final: bool = False) -> Parsed:
        name, self._name = self._name, None
        return Parsed("", [CallPiece(0, name, text)] if name or text else [])


def _array_grammar(tools: Sequence[Tool], parallel: bool) -> str:
    """Lark grammar, in llguidance's dialect, of a JSON array of calls.

    Each schema is a `%json` of its own, so that its references stay within it: one schema of all tools would have to merge
    their definitions, which may share names.
    """
    calls = [f"call_{i}" for i in range(len(tools))]
    more = ' (", " call)*' if parallel else ""
    rules = [f'start: "[" call{more} "]"', f"call: {' | '.join(calls)}"]
    for call, tool in zip(calls, tools):
        head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "parameters": ')
        rules += [f'{call}: {head} {call}_parameters "}}"', f"{call}_parameters: %json {json.dumps(tool.schema)}"]
    return "\n".join(rules) + "\n"
