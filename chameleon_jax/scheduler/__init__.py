"""What runs in the next step."""

from chameleon_jax.scheduler.fifo import FifoScheduler
from chameleon_jax.scheduler.plan import PrefillChunk, Scheduler, StepPlan

SCHEDULERS: dict[str, type[FifoScheduler]] = {"fifo": FifoScheduler}

__all__ = ["SCHEDULERS", "FifoScheduler", "PrefillChunk", "Scheduler", "StepPlan"]
