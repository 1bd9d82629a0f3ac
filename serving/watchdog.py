"""Watchdog of an engine's thread: a step that hangs ends every request."""

from __future__ import annotations

import logging
import threading

from chameleon_jax.errors import EngineDead
from chameleon_jax.serving.engine_thread import EngineThread

logger = logging.getLogger(__name__)


class Watchdog:
    """Thread that counts a step as hung after a time, and the engine as dead.

    Args:
        engine_thread: Thread that steps.
        step_timeout: Seconds of a step that hangs.
    """

    def __init__(self, engine_thread: EngineThread, step_timeout: float):
        self._engine_thread = engine_thread
        self._step_timeout = step_timeout
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._step_timeout / 4)):
            if self._engine_thread.step_seconds > self._step_timeout:
                logger.error("a step has taken more than %g s: the device hangs", self._step_timeout)
                self._engine_thread.die(EngineDead(f"the device hangs: a step has taken more than {self._step_timeout:g} s"))
