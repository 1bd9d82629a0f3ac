"""The thread that owns an engine. It steps while there is work, and runs commands between two steps."""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from chameleon_jax.errors import EngineDead
from chameleon_jax.output_processor import OutputSnapshot
from chameleon_jax.request import Request
from chameleon_jax.serving.engine import LLMEngine
from chameleon_jax.serving.open_streams import OpenStreams

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOAD_POLL_S = 1e-3
"""Seconds between looks at the loads while nothing can run before one ends."""

HAND_OVER_S = 1e-4
"""Seconds for which the thread leaves the interpreter to the readers of a step's tokens. Otherwise they would get it only when
the next step is dispatched. That step has time, as one is in flight; planned later, it has the requests that came meanwhile."""


class EngineThread:
    """Owner of `engine`: other threads use only its thread-safe parts from here on.

    When a step raises, the requests that ran are recomputed. When a step raises again before these have ended, or before any
    step has succeeded, the engine is dead. Then, and when a step hangs, every call fails with `EngineDead`.

    Args:
        streams: Told of updates and the engine's death, and its observers of loads. None may raise.

    Attributes:
        error: Cause of the engine's death; None while it lives.
    """

    def __init__(self, engine: LLMEngine, streams: OpenStreams):
        self.engine = engine
        self.error: EngineDead | None = None
        self._streams = streams
        self._commands: queue.SimpleQueue[tuple[Callable[[LLMEngine], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the fields below
        self._awaited: set[Future[Any]] = set()
        self._closed = False
        self._step_began: float | None = None
        self._steps_since_fault: int | None = None  # None: there was no fault
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def call(self, command: Callable[[LLMEngine], T]) -> Future[T]:
        """Run a command between two steps. The future fails with the command's error, or with EngineDead."""
        future: Future[T] = Future()
        with self._lock:
            if self.error is not None:
                future.set_exception(EngineDead(*self.error.args))  # one for each, as raising it adds its traceback
                return future
            if self._closed:
                future.set_exception(EngineDead("the engine is closed"))
                return future
            self._awaited.add(future)
            self._commands.put((command, future))
        return future

    def abort(self, request_id: str) -> Future[bool]:
        """End a request. The future says whether one of that id was unfinished."""

        def command(engine: LLMEngine) -> bool:
            request = engine.loop.abort(request_id)
            if request is not None:
                self._publish([request])
            return request is not None

        return self.call(command)

    @property
    def step_seconds(self) -> float:
        """Seconds that the step or command under way has taken so far; 0 between them."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def die(self, error: EngineDead) -> None:
        """End every call and request, from any thread, while a step hangs too."""
        with self._lock:
            if self.error is not None:
                return
            self.error = error
            awaited, self._awaited = self._awaited, set()
        for future in awaited:
            if future.running() or future.set_running_or_notify_cancel():
                future.set_exception(EngineDead(*error.args))
        self._streams.engine_died(error)

    def close(self, timeout: float = 30.0) -> bool:
        """End the thread after the step under way. Returns False where it hangs; the thread is left behind then."""
        with self._lock:
            self._closed = True
        self._commands.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.error("the engine's thread hangs in a step and is left behind")
        return not self._thread.is_alive()

    def _run(self) -> None:
        loop = self.engine.loop
        try:
            while self._run_commands(None if not loop.has_unfinished else LOAD_POLL_S if loop.awaits_load else 0.0):
                if self.error is not None:  # `die` has failed every command
                    return
                if loop.has_unfinished:
                    self._step()
        except BaseException as error:  # a bug; callers must not wait for this thread for ever
            logger.critical("the engine's thread failed", exc_info=error)
            self.die(EngineDead(f"the engine's thread failed: {error!r}"))

    def _run_commands(self, timeout: float | None) -> bool:
        """Run the commands that wait. Returns False where the thread is to end.

        Args:
            timeout: Seconds to wait for the first; None waits without limit.
        """
        while True:
            try:
                item = self._commands.get(timeout=timeout) if timeout != 0.0 else self._commands.get_nowait()
            except queue.Empty:
                return True
            if item is None:
                return False
            self._execute(*item)
            timeout = 0.0

    def _execute(self, command: Callable[[LLMEngine], Any], future: Future[Any]) -> None:
        with self._lock:
            if self.error is not None:
                return
            if not future.set_running_or_notify_cancel():
                self._awaited.discard(future)
                return
        self._step_began = time.monotonic()
        try:
            answer = functools.partial(future.set_result, command(self.engine))
        except BaseException as error:
            answer = functools.partial(future.set_exception, error)
        finally:
            self._step_began = None
        with self._lock:
            if future not in self._awaited:  # `die` has failed it
                return
            self._awaited.discard(future)
        answer()

    def _step(self) -> None:
        self._step_began = time.monotonic()
        try:
            updated = self.engine.loop.step(wait=False)
        except Exception as error:
            self._fault(error)
            return
        finally:
            self._step_began = None
        if self._steps_since_fault is not None:
            self._steps_since_fault += 1
        self._publish(updated)
        loads = self.engine.loop.ended_loads
        while loads:
            self._streams.observers.loaded(loads.popleft())
        if updated:
            time.sleep(HAND_OVER_S)

    def _fault(self, error: Exception) -> None:
        loop = self.engine.loop
        logger.error("a step failed", exc_info=error)
        recomputed = any(request.metrics.num_faults for request in loop.unfinished)
        if recomputed or self._steps_since_fault in (0, 1):  # a step hands out the tokens of the one before
            self.die(EngineDead(f"the device failed again: {error}"))
            return
        try:
            loop.recover()
        except Exception as second:
            logger.error("the device cannot be brought back", exc_info=second)
            self.die(EngineDead(f"the device failed ({error}) and cannot be brought back: {second}"))
            return
        self._steps_since_fault = 0

    def _publish(self, requests: list[Request]) -> None:
        snapshots = [OutputSnapshot.of(request) for request in dict.fromkeys(requests)]
        if snapshots and self.error is None:
            self._streams.updated(snapshots)
