"""Adapters and prompts of the demo, which other benchmarks serve too."""

from __future__ import annotations

from pathlib import Path

ADAPTERS = Path(__file__).parents[1] / "demo_adapters"
SHOWN_PROMPT = "The heart of man is"
PROMPTS = (
    SHOWN_PROMPT,
    "Love is",
    "In the beginning of the year, the people",
    "And when the king had heard these words, he",
    "A friend is somebody who",
    "To sleep, to dream, to wake again: the night",
    "The law of the land says that every man",
    "def read_lines(path):",
    "My lord, I bring you news of the war.",
    "HAPPINESS, n.",
)
