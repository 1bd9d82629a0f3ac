"""Pace of adapters on their way to the device, from the link's rate and the length of a step.

XLA lets a transfer into fresh device memory begin when everything that was dispatched before it has run, and a step's own small
inputs share the link with it. It gives pinned pieces streams of their own, of which inputs feel one piece at most, and pieces
from NumPy the stream of the inputs. So its source says; nothing here was measured on a GPU. Three things follow:

- New pieces are sent behind a step's inputs, which would wait for them, and ahead of its programs, for which they would wait.
- Pieces sent beside one step keep the link no longer than a step takes, or the inputs of the next one wait for the rest. At
  25 GB/s a step of 8 ms hides 200 MB, one of 20 ms 500 MB.
- A piece is seen to have arrived two steps after it was sent. It waits for the step that runs and travels beside the next one;
  then the host looks. Its write is executed a step later. The link is busy all the time if two steps' worth is on the way. A
  fixed 128 MiB would be 8.4 GB/s at 8 ms a step and 3.4 GB/s at 20 ms.
"""

from __future__ import annotations

from collections import deque

from chameleon_jax.models.adapters.transfers import MIN_TRANSFER_BYTES

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
        """Bytes that the link moves in the shortest of the last steps; 0 before there were two in a row."""
        return int(self._rate * min(self._steps, default=0.0))

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
