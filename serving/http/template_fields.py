"""Fields of a request that reach the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool

from chameleon_jax.serving.http.errors import ApiError
from chameleon_jax.serving.http.messages import Message
from chameleon_jax.serving.http.strict_model import NullIfEmpty, StrictModel
from chameleon_jax.serving.http.tool_definitions import MAX_TOOLS, ToolDefinition
from chameleon_jax.serving.service.service import Service

MAX_MESSAGES = 2048
MAX_DOCUMENTS = 1024

Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]

_FIELDS = {
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
}


def _refuse_fields(given: dict[str, Any]) -> dict[str, Any]:
    if fields := sorted(given.keys() & _FIELDS):
        raise ValueError(f"allowed: not {fields[0]}, which is a field of the request")
    return given


class TemplateFields(StrictModel):
    """Fields that completions of chats and their tokenisation share."""

    tools: Annotated[Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS, fail_fast=True)] | None, NullIfEmpty] = None
    documents: Annotated[
        Annotated[list[dict[str, Any]], Field(max_length=MAX_DOCUMENTS, fail_fast=True)] | None, NullIfEmpty
    ] = Field(default=None, description="Documents for the chat template, usually with title and text.")
    reasoning_effort: Annotated[Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None, NullIfEmpty] = (
        Field(
            default=None,
            description="Passed to the chat template, with enable_thinking false for none and true for the others, as in vLLM.",
        )
    )
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = Field(
        default=False, description="Continue the last message. Requires add_generation_prompt to be false."
    )
    chat_template: str | None = Field(
        default=None, description="Template for this request, on servers that were started with --trust-request-chat-template."
    )
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_refuse_fields)] = Field(
        default_factory=dict, description="Further variables for the chat template."
    )

    def check_template_fields(self) -> None:
        """Raise ApiError for fields that exclude each other."""
        if self.continue_final_message and self.add_generation_prompt:
            message = "continue_final_message is set; allowed: only with add_generation_prompt false"
            raise ApiError(400, message, param="continue_final_message")

    def template_variables(self) -> dict[str, Any]:
        """Arguments of `Service.chat_tokens`: those of the client, and the fields that it gave."""
        fields = {
            "tools": [tool.for_template() for tool in self.tools] if self.tools else None,
            "documents": self.documents,
            "reasoning_effort": self.reasoning_effort,
            "chat_template": self.chat_template or None,
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
        }
        thinks = {} if self.reasoning_effort is None else {"enable_thinking": self.reasoning_effort != "none"}
        return thinks | self.chat_template_kwargs | {name: value for name, value in fields.items() if value is not None}

    async def chat_tokens(self, service: Service, messages: Sequence[Message], add_special_tokens: bool = False) -> list[int]:
        """Format a conversation as the token ids of a prompt. Raises ValueError, ApiError."""
        if self.chat_template and not service.config.trust_request_chat_template:
            message = "chat_template is set; allowed: only where the server was started with --trust-request-chat-template"
            raise ApiError(400, message, param="chat_template")
        given = self.template_variables() | {"add_special_tokens": add_special_tokens}
        return await service.chat_tokens([message.for_template() for message in messages], **given)
