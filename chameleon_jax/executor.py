"""What the loop drives: something that computes steps and moves adapters. The device is behind it, or a cost model."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

from chameleon_jax.request import Request
from chameleon_jax.scheduler import StepPlan


class SampledToken(NamedTuple):
    """One token of one request; `logprobs` maps token ids to log-probabilities, the chosen one first."""

    request: Request
    token_id: int
    logprobs: dict[int, float] | None = None


@dataclasses.dataclass(frozen=True)
class LoadResult:
    """An adapter's load that ended.

    Attributes:
        error: why it failed; None: it did not.
        num_bytes: what was sent to the device for it.
        seconds: from its begin until the adapter could be used.
    """

    content_hash: str
    error: Exception | None = None
    num_bytes: int = 0
    seconds: float = 0.0


class Executor(Protocol):
    """Work is executed in the order it was dispatched: a page or a slot given to a new owner after a dispatch is safe, since
    what the new owner dispatches runs later."""

    def dispatch(self, plan: StepPlan) -> Any:
        """Starts a step and returns a handle; does not wait for it."""

    def collect(self, handle: Any) -> list[SampledToken]:
        """Waits for a dispatched step and returns its tokens."""

    def begin_load(self, content_hash: str, pages: list[int]) -> None:
        """Starts to bring an adapter into its pages; does not wait."""

    def poll_loads(self, wait: bool = False) -> list[LoadResult]:
        """Loads that ended: steps dispatched from now on may use the adapter. With `wait`, for at least one to end."""

    def cancel_load(self, content_hash: str) -> None:
        """Gives up a load that has begun and has not been reported as ended: nothing dispatched later writes to its pages."""

    def reset(self) -> None:
        """Forgets all steps and loads, and what the pool holds. After an error nothing else brings the device back."""
