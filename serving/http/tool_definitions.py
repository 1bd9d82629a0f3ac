"""Tools of a chat request, in OpenAI's form."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool

from chameleon_jax.serving.http.strict_model import StrictModel
from chameleon_jax.serving.tools.tool_choice import Tool

MAX_TOOLS = 512

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]+$", max_length=256)]


class FunctionDefinition(StrictModel):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON schema of an object. Default: no parameters.")
    strict: StrictBool | None = Field(
        default=None, description="Accepted and ignored: calls that tool_choice forces follow the schema, others may not."
    )


class ToolDefinition(StrictModel):
    """Function that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition

    @property
    def tool(self) -> Tool:
        return Tool(self.function.name, self.function.parameters)

    def for_template(self) -> dict[str, Any]:
        """Convert to the form that chat templates read, without fields that the client left out."""
        function = self.function.model_dump(exclude_unset=True, exclude={"strict"})
        return {"type": self.type, "function": function}


def check_tool_choice(value: Any) -> Any:
    """Return `value` where it has the form of a tool choice. Raises ValueError."""
    match value:
        case None | "none" | "auto" | "required" | {"type": "function", "function": {"name": str()}}:
            return value
    raise ValueError('allowed: none, auto, required or {"type": "function", "function": {"name": NAME}}')
