"""When a request must be done."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from chameleon_jax.errors import DeadlineExceeded


class Deadline:
    """So many seconds from now, on the clock of the asyncio loop that runs. Raises ValueError where they are not above 0.

    Attributes:
        at: that time; None: there is no deadline.
    """

    def __init__(self, seconds: float | None):
        if seconds is not None and not seconds > 0:
            raise ValueError(f"timeout is {seconds!r}; allowed: above 0 seconds")
        self._seconds = seconds
        self.at = None if seconds is None else asyncio.get_running_loop().time() + seconds

    def error(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"the request took longer than {self._seconds:g} s")

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Ends what is inside when the time is over. Raises DeadlineExceeded then."""
        try:
            async with asyncio.timeout_at(self.at) as scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise self.error() from None
