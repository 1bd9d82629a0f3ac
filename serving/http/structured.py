"""Structured outputs that a request asks for: in OpenAI's way, in vLLM's, or by vLLM's older names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictStr

from chameleon_jax.errors import InvalidGrammar
from chameleon_jax.sampling_params import GRAMMAR_KINDS, StructuredOutputsParams
from chameleon_jax.serving.http.errors import ApiError
from chameleon_jax.serving.http.strict_model import NullIfEmpty, StrictModel, Unsupported, reject_unsupported

MAX_CHOICES = 1024
Choices = Annotated[list[StrictStr], Field(max_length=MAX_CHOICES, fail_fast=True)]
_GUIDED = ("json", "regex", "choice", "grammar", "whitespace_pattern")


class JsonSchema(StrictModel):
    """Schema of `response_format`. Any schema is kept to strictly."""

    name: StrictStr | None = None
    description: StrictStr | None = None
    json_schema: dict[str, Any] | StrictBool | None = Field(default=None, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(StrictModel):
    """OpenAI's way to ask for JSON: any object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    def structured_outputs(self) -> StructuredOutputsParams | None:
        """Return the language that it asks for; None for text. Raises InvalidGrammar."""
        if self.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if self.type == "text":
            return None
        if self.json_schema is None or self.json_schema.json_schema is None:
            raise InvalidGrammar("json_schema.schema is missing; allowed: a JSON schema")
        return StructuredOutputsParams(json=self.json_schema.json_schema)


class StructuredOutputs(StrictModel):
    """vLLM's way to ask for a language: one of the first five fields."""

    json_schema: dict[str, Any] | StrictStr | StrictBool | None = Field(default=None, alias="json")
    regex: StrictStr | None = None
    choice: Choices | None = None
    grammar: StrictStr | None = None
    json_object: StrictBool | None = None
    whitespace_pattern: StrictStr | None = None

    structural_tag: Unsupported = None
    disable_fallback: Annotated[Any, reject_unsupported(False)] = None
    disable_any_whitespace: Annotated[Any, reject_unsupported(False)] = None
    disable_additional_properties: Annotated[Any, reject_unsupported(False)] = None

    def params(self) -> StructuredOutputsParams:
        names = (*GRAMMAR_KINDS[1:], "whitespace_pattern")
        return StructuredOutputsParams(json=self.json_schema, **{name: getattr(self, name) for name in names})


class Structured(StrictModel):
    """Fields that ask for a language of the output; at most one of them, or several of the guided ones."""

    response_format: Annotated[ResponseFormat | None, NullIfEmpty] = Field(
        default=None, description="Text, any JSON object, or JSON of a schema."
    )
    structured_outputs: Annotated[StructuredOutputs | None, NullIfEmpty] = Field(
        default=None, description="Language of the output, as in vLLM."
    )
    guided_json: dict[str, Any] | StrictStr | StrictBool | None = Field(
        default=None, description="vLLM's older name of structured_outputs.json, as are the guided fields below."
    )
    guided_regex: Annotated[StrictStr | None, NullIfEmpty] = None
    guided_choice: Annotated[Choices | None, NullIfEmpty] = None
    guided_grammar: Annotated[StrictStr | None, NullIfEmpty] = None
    guided_whitespace_pattern: Annotated[StrictStr | None, NullIfEmpty] = None

    def language_fields(self) -> list[str]:
        """Names of the fields that ask for a language of the output."""
        names = ("response_format", "structured_outputs", *(f"guided_{name}" for name in _GUIDED))
        given = [name for name in names if getattr(self, name) not in (None, "")]
        if self.response_format is not None and self.response_format.type == "text":
            given.remove("response_format")
        return given

    def language(self) -> StructuredOutputsParams | None:
        """Return the language that the output is to have; None for any text. Raises ApiError or InvalidGrammar."""
        given = self.language_fields()
        guided = [name for name in given if name.startswith("guided_")]
        if len(given) - len(guided) > (0 if guided else 1):
            raise ApiError(400, f"{given[0]} and {given[1]} are set; allowed: one of them", param=given[1])
        if guided:
            return StructuredOutputsParams(**{name.removeprefix("guided_"): getattr(self, name) for name in guided})
        if self.structured_outputs is not None:
            return self.structured_outputs.params()
        return None if self.response_format is None else self.response_format.structured_outputs()

    @contextlib.contextmanager
    def name_language(self) -> Iterator[None]:
        """Raise errors of the output's language as ApiError, with the field that asks for it."""
        try:
            yield
        except InvalidGrammar as error:
            field = next(iter(self.language_fields()), "tool_choice")
            raise ApiError(400, f"{field}: {error.reason}", param=field) from error
