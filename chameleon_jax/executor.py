"""The executor protocol: computes steps and moves adapters for the loop. A device is behind it, or a cost model."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

from chameleon_jax.request import Request
from chameleon_jax.scheduler import StepPlan


class SampledToken(NamedTuple):
    """One token of one request. `logprobs` maps token ids to log-probabilities, the chosen token first."""

    request: Request
    token_id: int
    logprobs: dict[int, float] | None = None


@dataclasses.dataclass(frozen=True)
class LoadResult:
    """The end of an adapter's load.

    Attributes:
        error: Cause of its failure; None where it succeeded.
        num_bytes: Bytes that it sent to the device.
        seconds: Time from its begin until the adapter could be used.
    """

    content_hash: str
    error: Exception | None = None
    num_bytes: int = 0
    seconds: float = 0.0


class Executor(Protocol):
    """Runs work in the order of dispatch.

    So a page or slot may go to a new owner right after a dispatch: the new owner's work runs later.

    Attributes:
        num_compiled: Programs compiled so far. The host waits for each, so a step in flight meanwhile ends unseen. None while
            programs are compiled in the background: steps run larger ones in their place, and share the processors.
    """

    @property
    def num_compiled(self) -> int | None: ...

    def dispatch(self, plan: StepPlan) -> Any:
        """Start a step without waiting for it; return its handle."""

    def draw(self, handle: Any) -> None:
        """Draw the tokens that a dispatched step has left for now; called once the steps before it are collected.

        Guided tokens are such: a grammar allows them by the tokens before, which the host has not seen at the dispatch.
        """

    def collect(self, handle: Any) -> list[SampledToken]:
        """Wait for a dispatched step and return its tokens."""

    def begin_load(self, content_hash: str, pages: list[int]) -> None:
        """Start to bring an adapter into its pages, without waiting."""

    def poll_loads(self, wait: bool = False) -> list[LoadResult]:
        """Return the loads that ended. Steps dispatched from now on may use their adapters.

        Args:
            wait: Wait for at least one to end.
        """

    def cancel_load(self, content_hash: str) -> None:
        """Cancel a load that `poll_loads` has not returned: no later dispatch writes to its pages."""

    def forget(self, content_hash: str) -> None:
        """Drop an adapter that no name and no request has any more."""

    def reset(self) -> None:
        """Drop all steps, loads and the pool's content, after an error that lost them."""
