"""A plan is a value before it is a deed: what one step computes and which adapters start to load."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Protocol

from chameleon_jax.request import Request


@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """`num_tokens` known tokens of a request from position `start`; the last chunk samples the next token."""

    request: Request
    start: int
    num_tokens: int
    samples: bool


@dataclasses.dataclass
class StepPlan:
    """One step. `loads` lists `(content hash, pages)` whose transfer starts after the step was dispatched."""

    prefills: list[PrefillChunk] = dataclasses.field(default_factory=list)
    decodes: list[Request] = dataclasses.field(default_factory=list)
    loads: list[tuple[str, list[int]]] = dataclasses.field(default_factory=list)

    @property
    def runs(self) -> bool:
        """Whether the device has anything to compute."""
        return bool(self.prefills or self.decodes)


class Scheduler(Protocol):
    """Owns the order of requests. Memory is the pool's and the cache's, which it asks before it acts."""

    @property
    def waiting(self) -> Iterable[Request]: ...
    @property
    def running(self) -> Iterable[Request]: ...
    @property
    def num_waiting(self) -> int: ...

    def add(self, request: Request) -> None:
        """Takes in a new request."""

    def finish(self, request: Request, now: float) -> None:
        """Forgets a request, waiting or running, and gives back what it held."""

    def plan(self, now: float) -> StepPlan:
        """Decides the next step and books it: positions advance as if it had run."""
