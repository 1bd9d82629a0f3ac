"""Pace of adapters on their way to the device, from the link's rate and the length of a step.

XLA lets a transfer into fresh device memory begin when everything that was dispatched before it has run, and a step's own small
inputs share the link with it. It gives pinned pieces streams of their own, of which inputs feel one piece at most, and pieces
from NumPy the stream of the inputs. Three things follow:

- New pieces are sent behind a step's inputs, which would wait for them, and ahead of its programs, for which they would wait.
- Pieces sent beside one step keep the link for a share of the step (LINK_SHARE), or the next step waits.
- A piece is seen to have arrived two steps after it was sent. It waits for the step that runs and travels beside the next one;
  then the host looks. Its write is executed a step later. Two steps' worth is therefore on the way.
"""

from __future__ import annotations

from collections import deque

from chameleon_jax.models.adapters.transfers import MIN_TRANSFER_BYTES

LINK_SHARE = 0.5
"""Share of the link's rate that pieces may take beside steps. On an H200, steps of 32 rows took 8.8 ms, and the idle link moved
42 GB/s. Beside steps a share of 1 brought 21 GB/s and steps of 26 ms, 0.7 brought 21 and 12.1, 0.5 brought 13 and 10.0, 0.35
brought 9 and 9.5. A share above the rate that is left beside steps feeds on itself: a delayed step is longer, and a longer step
is followed by more pieces."""
TRIP_STEPS = 2
"""Steps from the sending of a piece until it is seen to have arrived."""
REMEMBERED_STEPS = 4
"""Last steps of which the shortest counts: a long step (of prompts, or of a busy host) must not make the next one wait."""


class LinkPace:
    """Limits on the bytes that may be sent now, beside steps of the length seen lately.

    Args:
        rate: Bytes a second of the link.
        max_bytes: Upper bound of the window.
    """

    def __init__(self, rate: float, max_bytes: int):
        self._rate = rate
        self._max_bytes = max_bytes
        self._steps: deque[float] = deque(maxlen=REMEMBERED_STEPS)  # seconds
        self._last: float | None = None  # when a step was dispatched behind another one
        self._busy = False

    @property
    def step_bytes(self) -> int:
        """Bytes that may be sent beside a step as short as the shortest of the last ones; 0 before there were two in a row."""
        return int(LINK_SHARE * self._rate * min(self._steps, default=0.0))

    @property
    def window(self) -> int:
        """Bytes that may be on the way at once. If the link is slower than it was measured, no more than this piles up."""
        return min(self._max_bytes, max(MIN_TRANSFER_BYTES, TRIP_STEPS * self.step_bytes))

    def dispatched(self, now: float) -> None:
        """Record that a step was dispatched at `now`, in seconds.

        Dispatches are a step apart while the device works all the time. The first two after a pause are not: they come one
        right after the other.
        """
        if self._last is not None:
            self._steps.append(now - self._last)
        self._last = now if self._busy else None
        self._busy = True

    def paused(self) -> None:
        """Record that the device has nothing to do."""
        self._last, self._busy = None, False
