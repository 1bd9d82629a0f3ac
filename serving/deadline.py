"""Deadline of a request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from chameleon_jax.checks import require
from chameleon_jax.errors import DeadlineExceeded


class Deadline:
    """A time by which a request must be done, on the clock of the running asyncio loop.

    Args:
        seconds: Seconds from now; None sets no deadline.

    Attributes:
        at: Time of the deadline; None where there is none.

    Raises:
        ValueError: `seconds` is not above 0.
    """

    def __init__(self, seconds: float | None):
        require(seconds is None or seconds > 0, "timeout", seconds, "above 0 seconds")
        self._seconds = seconds
        self.at = None if seconds is None else asyncio.get_running_loop().time() + seconds

    def error(self) -> DeadlineExceeded:
        """Make the error of a request that took too long."""
        return DeadlineExceeded(f"the request took longer than {self._seconds:g} s")

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Cancel the body at the deadline, and raise DeadlineExceeded."""
        try:
            async with asyncio.timeout_at(self.at) as scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise self.error() from None
