"""What clients ask and what they must be answered: greedy texts, computed offline before the server is there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from chameleon_jax import LLM, LoRARequest, SamplingParams

BASE = ""
"""Content of no adapter."""


@dataclasses.dataclass(frozen=True)
class Jobs:
    """
    Attributes:
        prompts: each with its number of output tokens.
        texts: `[content][prompt]`, where a content is an adapter's directory, or BASE.
    """

    prompts: list[tuple[str, int]]
    texts: dict[str, list[str]]

    @property
    def contents(self) -> list[str]:
        return [content for content in self.texts if content != BASE]

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, file: Path) -> Jobs:
        data = json.loads(file.read_text())
        return cls([(prompt, tokens) for prompt, tokens in data["prompts"]], data["texts"])


def prepare(model: str, prompts: Sequence[tuple[str, int]], contents: Sequence[str], settings: Mapping[str, object]) -> Jobs:
    """Answers every prompt with every content, each by itself."""
    texts: dict[str, list[str]] = {}
    with LLM(model, **settings) as llm:  # type: ignore[arg-type]
        for content in (BASE, *contents):
            lora = None if content == BASE else LoRARequest(content, content)
            texts[content] = [
                llm.generate(prompt, SamplingParams(temperature=0, max_tokens=tokens), lora)[0].outputs[0].text
                for prompt, tokens in prompts
            ]
    for i in range(len(prompts)):
        assert len({texts[content][i] for content in texts}) > 1, f"prompt {i} does not tell the adapters apart"
    return Jobs(list(prompts), texts)
