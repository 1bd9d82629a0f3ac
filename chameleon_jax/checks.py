"""How settings are checked: at the edge, with an error that names the field, the value and what is allowed."""

from __future__ import annotations


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raises ValueError where `condition` is false."""
    if not condition:
        raise ValueError(f"{field} is {value!r}; allowed: {allowed}")
