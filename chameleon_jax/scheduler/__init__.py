"""Plans of steps: which requests run next, and which adapters load for them."""

from chameleon_jax.scheduler.plan import PrefillChunk, StepPlan
from chameleon_jax.scheduler.scheduler import Scheduler

__all__ = ["PrefillChunk", "Scheduler", "StepPlan"]
