"""Counts of the programs that JAX compiled, at the start and while serving. The latter are none with `compile_ahead`."""

from __future__ import annotations

import contextlib
import threading

import jax.monitoring

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""Event that JAX records for each program compiled, or read from the compilation cache."""

CACHE_EVENT = "/jax/compilation_cache/cache_hits"
"""Event that JAX records for each program read from the compilation cache."""


class Compilations:
    """Counter of compilations, from its creation until `close`.

    Attributes:
        at_start: Compilations before `serve` was called.
        while_serving: Compilations since.
        cache_hits: Programs, of both kinds, that were read from the compilation cache.
    """

    def __init__(self) -> None:
        self.at_start = self.while_serving = self.cache_hits = 0
        self._serving = False
        self._lock = threading.Lock()  # programs are compiled on several threads
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        jax.monitoring.register_event_listener(self._on_cache_event)

    def serve(self) -> None:
        """Count compilations as `while_serving` from now on: they delay requests."""
        self._serving = True

    def close(self) -> None:
        with contextlib.suppress(AssertionError, ValueError):  # all listeners were cleared meanwhile
            jax.monitoring.unregister_event_duration_listener(self._on_event)
            jax.monitoring.unregister_event_listener(self._on_cache_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event != COMPILE_EVENT:
            return
        with self._lock:
            if self._serving:
                self.while_serving += 1
            else:
                self.at_start += 1

    def _on_cache_event(self, event: str, **_: str | int) -> None:
        if event == CACHE_EVENT:
            with self._lock:
                self.cache_hits += 1
