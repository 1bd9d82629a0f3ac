"""A plan is a value before it is a deed: what one step computes and which adapters start to load."""

from __future__ import annotations

import dataclasses

import numpy as np

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
    """One step.

    Attributes:
        loads: `(content hash, pages)` of adapters whose transfer starts now.
        cancels: content hashes of adapters whose transfer is given up, before the loads start.
        features: what `step_cost.StepCost` learns from; None where nothing is to be learnt.
        awaited: content hashes of adapters that have to be there before the step may run.
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
