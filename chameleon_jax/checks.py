"""Checks of settings, made where they enter. An error names the field, the value and the allowed values."""

from __future__ import annotations

import reprlib

from chameleon_jax.errors import InvalidValue

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxtuple = 2


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raise InvalidValue where `condition` is false; a long value is abbreviated."""
    if not condition:
        raise InvalidValue(field, f"{field} is {_SHORT.repr(value)}; allowed: {allowed}")


def require_field(settings: object, field: str, condition: bool, allowed: str) -> None:
    """Raise InvalidValue as `require` does, with the value that `settings` has for the field."""
    require(condition, field, getattr(settings, field), allowed)
