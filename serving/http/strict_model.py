"""JSON objects that clients send: the fields that are known, and the values that change nothing."""

from __future__ import annotations

from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Body(BaseModel):
    """An object of which every field is known. Fields that are null say nothing, known or not."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        unknown = next((name for name in given if name not in cls.model_fields), None)
        if unknown is not None:
            raise PydanticCustomError(
                "extra_forbidden", "unknown field", {"field": unknown[:200].encode(errors="replace").decode()}
            )
        return given


EMPTY: tuple[Any, ...] = (False, "", [], {})
"""Values that say nothing. Not for fields whose empty value is a wish of its own, as the schema `{}` is."""


def only(*values: Any) -> AfterValidator:
    """Restrict a field that is not supported to the values that change nothing, and null."""
    allowed = " or ".join(["null", *map(repr, values)])

    def check(value: Any) -> Any:
        said = {name: entry for name, entry in value.items() if entry is not None} if isinstance(value, dict) else value
        if said not in values:
            raise ValueError(f"it is not supported, allowed: {allowed}")
        return value

    return AfterValidator(check)
