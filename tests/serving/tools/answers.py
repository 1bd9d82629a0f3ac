"""Answers of models, fed to parsers in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from chameleon_jax.serving.tools.call_parser import OutputParser

Read = tuple[str, list[tuple[str, str]]]
"""Content of an answer, and the name and arguments of each call."""


def read(parser: OutputParser, pieces: Sequence[str]) -> Read:
    """Read an answer as clients do: a name begins a call, and later pieces continue the call of their index."""
    content, names, arguments = "", [], []
    for i, text in enumerate(pieces):
        parsed = parser.feed(text, final=i == len(pieces) - 1)
        content += parsed.content
        assert len({call.index for call in parsed.calls}) == len(parsed.calls)
        for call in parsed.calls:
            if call.name is not None:
                assert call.index == len(names)
                names.append(call.name)
                arguments.append("")
            arguments[call.index] += call.arguments
    return content, list(zip(names, arguments))
