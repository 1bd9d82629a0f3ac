"""Messages of a conversation, as clients send them and as chat templates know them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from chameleon_jax.serving.http.body import EMPTY, Body, only

MAX_PARTS = 1024


class Part(Body):
    """Of a message: text, or a refusal that a model gave."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    # taken and not used: prompts are not cached
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None

    @model_validator(mode="before")
    @classmethod
    def _type_first(cls, data: Any) -> Any:
        """Has another type named, and not the fields that come with it."""
        if isinstance(data, dict) and data.get("type") not in (None, "text", "refusal"):
            return {"type": data["type"]}
        return data

    @model_validator(mode="after")
    def _complete(self) -> Part:
        if self.said is None:
            raise ValueError(f"allowed: with {self.type}")
        return self

    @property
    def said(self) -> str | None:
        return self.text if self.type == "text" else self.refusal


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    refusal: str | None = Field(default=None, description="The text of a message without content.")
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(default=None, description="As `reasoning`, for the chat template.")
    reasoning: str | None = None

    # taken and not used: no template has them
    annotations: Any = None
    cache_control: Any = None

    tool_calls: Annotated[Any, only(*EMPTY)] = None
    function_call: Annotated[Any, only(*EMPTY)] = None
    audio: Annotated[Any, only(*EMPTY)] = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it."""
        content = self.content or self.refusal or ""
        text = content if isinstance(content, str) else "".join(part.said or "" for part in content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        optional = ("name", "tool_call_id", "reasoning_content", "reasoning")
        return message | {name: value for name in optional if (value := getattr(self, name)) is not None}
