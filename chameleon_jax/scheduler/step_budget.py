"""Time that prompts may take in a step that also decodes, given the cost of steps so far."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from chameleon_jax.request import Request
from chameleon_jax.scheduler.plan import StepPlan
from chameleon_jax.scheduler.step_cost import PREFILL, StepCost
from chameleon_jax.scheduler.step_shapes import StepShapes

GUESSED_TOKEN_S = 1e-3
"""Assumed seconds of a prompt token until enough steps were timed."""


@dataclasses.dataclass(eq=False)
class StepBudget:
    """Seconds of prompts, of requests and of steps.

    **The share of prompts.** Let F be the cost of a step beside its prompts: its decodes, and its fixed part. To end within
    the target, prompts may take target - F, a share of 1 - F / target. That share falls to nothing as F nears the target,
    while prompts wait and the throughput that the fixed parts cost is lost. So from F = target / 2 on, the share is F / target
    instead: half of the step where the target is half used up, all of it once the target is out of reach, where no step could
    meet it anyway. A target that the device cannot meet then costs no throughput. Nor does one that it can meet under less
    load: the share is at least the square of the part of `patience` for which the oldest request without a computed prompt has
    waited. Short waits, which every load has, then change little.

    Attributes:
        target: seconds between tokens; None leaves prompts unbounded.
        patience: seconds of waiting after which prompts are unbounded.
        learns: whether steps are timed.
        slots: most requests that run at once.
        rank_of: rank of a request's adapter, 0 without one.
        shapes: sizes of the steps for which the device has programs.
    """

    target: float | None
    patience: float
    learns: bool
    slots: int
    rank_of: Callable[[Request], int]
    shapes: StepShapes
    _cost: StepCost = dataclasses.field(default_factory=StepCost)

    # -- requests -------------------------------------------------------------------------------------------------------

    def prefill_seconds(self, request: Request, tokens: int) -> float:
        """Estimate the seconds of so many prompt tokens of a request; a guess until enough steps were timed."""
        if not self._cost.known:
            return tokens * GUESSED_TOKEN_S
        return self._cost.prefill_seconds(tokens, self.rank_of(request))

    def prompt_seconds(self, request: Request) -> float:
        """Estimate the seconds of the whole prompt, and of output that has to be computed again."""
        return self.prefill_seconds(request, request.num_known)

    def work(self, request: Request) -> float:
        """Device seconds for which other requests wait: the prompt, and a share of a full step for every output token."""
        output = max(request.predicted_output_len - len(request.output_token_ids), 0)
        return self.prompt_seconds(request) + output * self._cost.output_seconds(self.slots)

    # -- steps ----------------------------------------------------------------------------------------------------------

    def pass_tokens(self, decodes: bool) -> float:
        """Estimate the fixed cost of a further step's prompts, in prompt tokens; 0 until enough steps were timed.

        Args:
            decodes: whether this step decodes. The next one then runs anyway, and is charged for its prompts alone.
        """
        return self._cost.pass_tokens(decodes) if self._cost.known else 0.0

    def bound_prefills(self, plan: StepPlan, waited: float) -> float:
        """Seconds that prompts may take beside the plan's decodes.

        Args:
            plan: the step, its decodes already planned.
            waited: seconds for which the oldest request without a computed prompt has waited.
        """
        if self.learns:
            plan.features = self._cost.decode_features(plan.decodes)
        if self.target is None or not plan.decodes or plan.features is None or not self._cost.known:
            return math.inf
        fixed = plan.features.copy()
        fixed[PREFILL] = 1.0
        return prompt_share(self._cost.seconds(fixed), self.target, (waited / self.patience) ** 2)

    def note_prefills(self, plan: StepPlan) -> None:
        """Add the plan's prompts to its features, for `observe_step`."""
        if plan.features is not None:
            self._cost.add_prompts(plan.features, plan.prefills, self.rank_of, self.shapes)

    def observe_step(self, plan: StepPlan, seconds: float) -> None:
        """Learn from a step that took so many seconds."""
        if plan.features is not None:
            self._cost.observe(plan.features, seconds)

    def forget_steps(self) -> None:
        """Forget all steps that were observed."""
        self._cost = StepCost()


def prompt_share(fixed: float, target: float, hurry: float = 0.0) -> float:
    """Seconds that prompts may take in a step; see `StepBudget`.

    Args:
        fixed: seconds of a step beside its prompts.
        target: seconds that the step should take.
        hurry: least share of the step that prompts get.
    """
    share = max(fixed / target, hurry)
    if share >= 1:
        return math.inf
    return max(target - fixed, fixed * share / (1 - share))
