"""What runs in the next step."""

from chameleon_jax.scheduler.plan import PrefillChunk, StepPlan
from chameleon_jax.scheduler.scheduler import Scheduler

__all__ = ["PrefillChunk", "Scheduler", "StepPlan"]
