"""The plan of one step: computation, and adapters that start to load. A value before anything is done."""

from __future__ import annotations

import dataclasses

import numpy as np

from chameleon_jax.request import Request


@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """Consecutive known tokens of one request, computed in one step.

    Attributes:
        request: the request.
        start: position of the first token.
        num_tokens: tokens of the chunk.
        samples: whether it is the prompt's last chunk, after which the next token is sampled.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool


@dataclasses.dataclass
class StepPlan:
    """Plan of one step.

    Attributes:
        prefills: chunks of prompts.
        decodes: requests that compute their next token.
        loads: `(content hash, pages)` of adapters that start to load.
        cancels: content hashes of adapters whose load is given up, before the loads start.
        awaited: content hashes of adapters that must be resident before the step may run.
        features: input of `step_cost.StepCost`; None where steps are not timed.
    """

    prefills: list[PrefillChunk] = dataclasses.field(default_factory=list)
    decodes: list[Request] = dataclasses.field(default_factory=list)
    loads: list[tuple[str, list[int]]] = dataclasses.field(default_factory=list)
    cancels: list[str] = dataclasses.field(default_factory=list)
    awaited: list[str] = dataclasses.field(default_factory=list)
    features: np.ndarray | None = None

    @property
    def runs(self) -> bool:
        """Whether the device has anything to compute."""
        return bool(self.prefills or self.decodes)
