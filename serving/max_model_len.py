"""Longest sequence that an engine serves, where its settings leave the choice open."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from chameleon_jax.checks import require

HOST_LIMIT = 2048
"""Tokens at most on a CPU, whose memory is also wanted for other things. A setting may exceed it."""


class MaxModelLen(NamedTuple):
    """Longest sequence, prompt and output, in tokens, and the reason for it."""

    tokens: int
    reason: str


@dataclasses.dataclass(frozen=True)
class LengthLimits:
    """Limits to the longest sequence, but for the page pool.

    Attributes:
        wanted: The setting; None leaves the choice open.
        model: Longest sequence of the model, in tokens.
        page_tokens: Tokens of a page.
        adapter_pages: Pages of the largest adapter.
        on_host: Whether the host's processor computes.

    Raises:
        ValueError: `wanted` exceeds the model's limit.
    """

    wanted: int | None
    model: int
    page_tokens: int
    adapter_pages: int
    on_host: bool

    def __post_init__(self) -> None:
        allowed = f"at most {self.model}, the model's limit"
        require(self.wanted is None or self.wanted <= self.model, "max_model_len", self.wanted, allowed)

    def choose(self, num_pages: int) -> MaxModelLen:
        """Choose the longest sequence for a pool: one that fits beside the largest adapter, or in half of it if that is more.

        Args:
            num_pages: Pages of the pool, the trash page included.
        """
        if self.wanted is not None:
            return MaxModelLen(self.wanted, "as set")
        capacity = num_pages - 1
        room = self.page_tokens * max(capacity - self.adapter_pages, capacity // 2, 1)
        if self.on_host and min(self.model, room) > HOST_LIMIT:
            return MaxModelLen(HOST_LIMIT, f"the most on a CPU unless it is set; the model's limit is {self.model}")
        if self.model <= room:
            return MaxModelLen(self.model, "the model's limit")
        text = f"as much as the pool of {num_pages} pages holds beside the largest adapter; the model's limit is {self.model}"
        return MaxModelLen(room, text)
