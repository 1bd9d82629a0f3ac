"""How long prompts may take of a step that also decodes, by what steps have cost so far."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from chameleon_jax.request import Request
from chameleon_jax.scheduler.plan import StepPlan
from chameleon_jax.scheduler.prefill_shapes import PrefillShapes
from chameleon_jax.scheduler.step_cost import PREFILL, StepCost

GUESSED_TOKEN_S = 1e-3
"""Seconds of a prompt token before enough steps were timed."""


class StepBudget:
    """Seconds of prompts, of requests and of steps.

    **The share of prompts.** Let F be what a step costs beside its prompts: its decodes, and its fixed part. To end within
    the target, prompts may take target - F, a share of 1 - F / target. That share falls to nothing as F nears the target,
    while prompts wait and the throughput that the fixed parts cost is lost. So from F = target / 2 on, the share is F / target
    instead: half of the step where the target is half used up, all of it once the target is out of reach, where no step could
    meet it anyway. A target that the device cannot meet then costs no throughput. Nor does one that it can meet under less
    load: the share is at least the part of `patience` for which the oldest waiting request has waited.

    Args:
        target: seconds between tokens; None: prompts take what they like.
        patience: seconds of waiting after which prompts take what they like.
        learns: whether steps are timed.
        slots: requests that run at once, at most.
        rank_of: rank of a request's adapter, 0 without one.
        shapes: in which the device prefills.
    """

    def __init__(
        self,
        target: float | None,
        patience: float,
        learns: bool,
        slots: int,
        rank_of: Callable[[Request], int],
        shapes: PrefillShapes,
    ):
        self._target = target
        self._patience = patience
        self._learns = learns
        self._slots = slots
        self._rank_of = rank_of
        self._shapes = shapes
        self._cost = StepCost()

    # -- requests -------------------------------------------------------------------------------------------------------

    def prefill_seconds(self, request: Request, tokens: int) -> float:
        """Seconds of that many prompt tokens. Until steps have been seen, a guess."""
        tokens = self._shapes.padded(tokens)
        if not self._cost.known:
            return tokens * GUESSED_TOKEN_S
        return self._cost.prefill_seconds(tokens, self._rank_of(request))

    def prompt_seconds(self, request: Request) -> float:
        """Seconds of the whole prompt, and of the output that has to be computed again."""
        return self.prefill_seconds(request, request.num_known)

    def work(self, request: Request) -> float:
        """Seconds of the device for which others wait: the prompt, and its share of full steps for every token of output."""
        output = max(request.predicted_output_len - len(request.output_token_ids), 0)
        return self.prompt_seconds(request) + output * self._cost.output_seconds(self._slots)

    # -- steps ----------------------------------------------------------------------------------------------------------

    @property
    def pass_tokens(self) -> float:
        """Fixed cost of a step's prefill, in prompt tokens. Until steps have been seen, 0."""
        return self._cost.pass_tokens if self._cost.known else 0.0

    def decodes_planned(self, plan: StepPlan, waited: float) -> float:
        """Returns seconds that prompts may take beside the plan's decodes.

        Args:
            waited: seconds for which the oldest waiting request has waited.
        """
        if self._learns:
            plan.features = self._cost.features((), plan.decodes, self._rank_of, self._shapes)
        if self._target is None or not plan.decodes or plan.features is None or not self._cost.known:
            return math.inf
        prefill = np.zeros_like(plan.features)
        prefill[PREFILL] = 1.0
        return prompt_share(self._cost.seconds(plan.features + prefill), self._target, waited / self._patience)

    def prefills_planned(self, plan: StepPlan) -> None:
        """Notes the plan's prompts, for `ran`."""
        if plan.features is not None:
            plan.features += self._cost.features(plan.prefills, (), self._rank_of, self._shapes)

    def ran(self, plan: StepPlan, seconds: float) -> None:
        """Learns from a step that took that long."""
        if plan.features is not None:
            self._cost.observe(plan.features, seconds)


def prompt_share(fixed: float, target: float, hurry: float = 0.0) -> float:
    """Seconds of prompts in a step with `fixed` seconds of other work; see `StepBudget`.

    Args:
        hurry: least share of the step.
    """
    share = max(fixed / target, hurry)
    if share >= 1:
        return math.inf
    return max(target - fixed, fixed * share / (1 - share))
