"""Prompts of the clients with their correct answers: greedy texts, computed offline before the server starts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chameleon_jax.sampling_params import LoRARequest, SamplingParams

if TYPE_CHECKING:
    from chameleon_jax.serving.engine import LLMEngine

BASE = ""
"""Content of the base model, which has no adapter."""


@dataclasses.dataclass(frozen=True)
class Jobs:
    """Prompts, adapters and correct texts.

    Attributes:
        prompts: Prompts, each with its number of output tokens.
        fixed: Directories of the adapters that stay.
        changing: Directories of the adapters that come and go.
        texts: Texts by content and prompt, where a content is an adapter's directory, or BASE.
    """

    prompts: list[tuple[str, int]]
    fixed: list[str]
    changing: list[str]
    texts: dict[str, list[str]]

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, file: Path) -> Jobs:
        data = json.loads(file.read_text())
        return cls(**data | {"prompts": [(prompt, tokens) for prompt, tokens in data["prompts"]]})


def prepare(
    model: str | LLMEngine,
    prompts: Sequence[tuple[str, int]],
    fixed: Sequence[str],
    changing: Sequence[str],
    settings: Mapping[str, object],
) -> Jobs:
    """Answer every prompt with every content, one at a time."""
    from chameleon_jax import LLM  # here, as the clients' process needs no JAX

    texts: dict[str, list[str]] = {}
    with LLM(model, **settings) as llm:  # type: ignore[arg-type]
        for content in (BASE, *fixed, *changing):
            lora = None if content == BASE else LoRARequest(content, content)
            texts[content] = [
                llm.generate(prompt, SamplingParams(temperature=0, max_tokens=tokens), lora)[0].outputs[0].text
                for prompt, tokens in prompts
            ]
    for i in range(len(prompts)):
        assert len({texts[content][i] for content in texts}) > 1, f"prompt {i} does not tell the adapters apart"
    return Jobs(list(prompts), list(fixed), list(changing), texts)
