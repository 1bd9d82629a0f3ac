"""Messages of a conversation, in the form of OpenAI and in the form of chat templates."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from chameleon_jax.serving.http.strict_model import NullIfEmpty, StrictModel, Unsupported

MAX_PARTS = 1024
MAX_CALLS = 1024


class Part(StrictModel):
    """Part of a message's content: text, or a refusal by the model."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    # accepted and ignored: prompts are not cached
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None

    @model_validator(mode="before")
    @classmethod
    def _keep_unknown_type(cls, data: Any) -> Any:
        """Drop all but an unknown type, so that the error names the type and not the fields that come with it."""
        if isinstance(data, dict) and data.get("type") not in (None, "text", "refusal"):
            return {"type": data["type"]}
        return data

    @model_validator(mode="after")
    def _require_text(self) -> Part:
        if self.content is None:
            raise ValueError(f"allowed: with {self.type}")
        return self

    @property
    def content(self) -> str | None:
        return self.text if self.type == "text" else self.refusal


class FunctionCall(StrictModel):
    name: str
    arguments: str | dict[str, Any] = Field(default="", description="JSON object, as text.")

    def for_template(self) -> dict[str, Any]:
        """Convert to the fields that chat templates read: they write the arguments as JSON themselves.

        Text that is no JSON object, which a model may have written, stays text.
        """
        arguments = self.arguments or "{}"
        if isinstance(arguments, str):
            try:
                value = json.loads(arguments)
            except (ValueError, RecursionError):
                value = None
            arguments = value if isinstance(value, dict) else arguments
        return {"name": self.name, "arguments": arguments}


class ToolCall(StrictModel):
    """Call of a tool by the model."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Any = Field(default=None, description="Accepted, as calls of a stream have it, and ignored.")

    def for_template(self) -> dict[str, Any]:
        call: dict[str, Any] = {"type": self.type, "function": self.function.for_template()}
        return call if self.id is None else {"id": self.id} | call


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    refusal: str | None = Field(default=None, description="Text of a message that has no content.")
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None, NullIfEmpty] = None
    reasoning_content: str | None = Field(default=None, description="Like `reasoning`: passed to the chat template.")
    reasoning: str | None = None

    # accepted and ignored: no chat template uses them
    annotations: Any = None
    cache_control: Any = None

    function_call: Unsupported = None
    audio: Unsupported = None

    def for_template(self) -> dict[str, Any]:
        """Convert to the fields that chat templates read."""
        content = self.content or self.refusal or ""
        text = content if isinstance(content, str) else "".join(part.content or "" for part in content)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        optional = ("name", "tool_call_id", "reasoning_content", "reasoning")
        return message | {name: value for name in optional if (value := getattr(self, name)) is not None}
