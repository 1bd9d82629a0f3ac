"""Search for the end of a JSON object in text that comes in pieces."""

from __future__ import annotations


class BracketScanner:
    """Scanner that counts brackets outside of strings.

    Args:
        depth: Brackets that are open before the first piece.
    """

    def __init__(self, depth: int = 0):
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def end(self, text: str) -> int | None:
        """Scan the next piece. Returns the index behind the bracket that closes the last open one, None if it is not there."""
        for i, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
        return None
