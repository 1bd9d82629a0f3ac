"""Counts of the programs that JAX compiled: at the start, in the background, and while requests wait for them."""

from __future__ import annotations

import contextlib
import threading

import jax.monitoring

from chameleon_jax.models.runtime.compile_threads import THREAD_NAME

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""Event that JAX records for each program compiled, or read from the compilation cache."""

CACHE_EVENT = "/jax/compilation_cache/cache_hits"
"""Event that JAX records for each program read from the compilation cache."""


class Compilations:
    """Counter of compilations, from its creation until `close`.

    Attributes:
        at_start: Compilations before `serve` was called.
        in_background: Compilations since, on threads that no request waits for.
        while_serving: Other compilations since: of steps, with `compile_programs="lazy"`.
        cache_hits: Programs, of all kinds, that were read from the compilation cache.
    """

    def __init__(self) -> None:
        self.at_start = self.in_background = self.while_serving = self.cache_hits = 0
        self._serving = False
        self._lock = threading.Lock()  # programs are compiled on several threads
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        jax.monitoring.register_event_listener(self._on_cache_event)

    def serve(self) -> None:
        """Count compilations as `in_background` or `while_serving` from now on. The latter delay requests."""
        self._serving = True

    def close(self) -> None:
        with contextlib.suppress(AssertionError, ValueError):  # all listeners were cleared meanwhile
            jax.monitoring.unregister_event_duration_listener(self._on_event)
            jax.monitoring.unregister_event_listener(self._on_cache_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event != COMPILE_EVENT:
            return
        with self._lock:
            if not self._serving:
                self.at_start += 1
            elif threading.current_thread().name.startswith(THREAD_NAME):
                self.in_background += 1
            else:
                self.while_serving += 1

    def _on_cache_event(self, event: str, **_: str | int) -> None:
        if event == CACHE_EVENT:
            with self._lock:
                self.cache_hits += 1
