"""JSON objects of requests: fields that are known, and unsupported fields limited to values that change nothing."""

from __future__ import annotations

import functools
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class StrictModel(BaseModel):
    """Object that refuses unknown fields. A field that is null counts as left out, known or not."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        unknown = next((name for name in given if name not in cls._names()), None)
        if unknown is not None:
            raise PydanticCustomError(
                "extra_forbidden", "unknown field", {"field": unknown[:200].encode(errors="replace").decode()}
            )
        return given

    @classmethod
    @functools.cache
    def _names(cls) -> frozenset[str]:
        """Names that its fields have in JSON."""
        return frozenset(field.alias or name for name, field in cls.model_fields.items())


ACCEPTED_VALUES: tuple[Any, ...] = (False, "", [], {})
"""Empty values, which ask for nothing. Not for fields whose empty value has a meaning, such as the JSON schema `{}`."""


def _null_if_empty(value: Any) -> Any:
    return None if value in ACCEPTED_VALUES else value


NullIfEmpty = BeforeValidator(_null_if_empty)
"""Validator of a field whose empty value asks for nothing."""


def reject_unsupported(*accepted: Any) -> AfterValidator:
    """Make a validator that accepts only null and `accepted`, for a field that is not supported."""
    allowed = " or ".join(["null", *map(repr, accepted)])

    def check(value: Any) -> Any:
        compared = {name: entry for name, entry in value.items() if entry is not None} if isinstance(value, dict) else value
        if compared not in accepted:
            raise ValueError(f"it is not supported, allowed: {allowed}")
        return value

    return AfterValidator(check)


Unsupported = Annotated[Any, reject_unsupported(*ACCEPTED_VALUES)]
"""Type of a field that is not supported and accepted only if empty."""
