"""How many programs JAX compiled, and how many of them while requests waited. The latter should stay 0."""

from __future__ import annotations

import contextlib
import threading

import jax.monitoring

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""What JAX tells after it compiled a program, or read a compiled one from its cache."""


class Compilations:
    """Counts from when it is made until `close`.

    Attributes:
        at_start: those before `serve` was called; while_serving: those since.
    """

    def __init__(self) -> None:
        self.at_start = self.while_serving = 0
        self._serving = False
        self._lock = threading.Lock()  # programs are compiled on several threads
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def serve(self) -> None:
        """The engine is up: whatever is compiled from now on holds requests back."""
        self._serving = True

    def close(self) -> None:
        with contextlib.suppress(AssertionError, ValueError):  # somebody cleared all listeners
            jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event != COMPILE_EVENT:
            return
        with self._lock:
            if self._serving:
                self.while_serving += 1
            else:
                self.at_start += 1
