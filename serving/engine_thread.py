"""The thread that owns an engine: it steps while there is work, and does what others ask for between two steps."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from chameleon_jax.errors import EngineDead
from chameleon_jax.executor import LoadResult
from chameleon_jax.request import Request
from chameleon_jax.serving.engine import Engine
from chameleon_jax.serving.updates import Update

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOAD_POLL_S = 1e-3
"""How often loads are looked at while nothing can run before one ends."""

HAND_OVER_S = 1e-4
"""After a step the interpreter is left to those who wait for its tokens. Otherwise they get it when the next is dispatched.
That has time, as one is in flight; and planned later, it has the requests that came meanwhile."""


class Listener(Protocol):
    """Told by the engine's thread; returns at once and raises nothing."""

    def updated(self, updates: list[Update]) -> None:
        """Requests have new tokens or ended."""

    def loaded(self, result: LoadResult) -> None:
        """An adapter's load ended."""

    def died(self, error: EngineDead) -> None:
        """No request will be updated any more."""


class EngineThread:
    """Nobody else touches `engine` once this is made, but for what is thread-safe in it.

    If a step raises, requests that ran are recomputed; if a step raises again before these have ended, or before any has
    succeeded, the engine is dead. Then, and when it is found to hang, every call fails with `EngineDead`.
    """

    def __init__(self, engine: Engine, listener: Listener):
        self.engine = engine
        self.error: EngineDead | None = None
        self._listener = listener
        self._commands: queue.SimpleQueue[tuple[Callable[[Engine], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards what follows
        self._awaited: set[Future[Any]] = set()
        self._closed = False
        self._step_began: float | None = None
        self._steps_since_fault: int | None = None  # None: there was no fault
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def call(self, command: Callable[[Engine], T]) -> Future[T]:
        """Runs it between two steps. The future fails with whatever it raises, or with EngineDead."""
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
        """Ends a request; whether there was one."""

        def command(engine: Engine) -> bool:
            request = engine.loop.abort(request_id)
            if request is not None:
                self._publish([request])
            return request is not None

        return self.call(command)

    @property
    def step_seconds(self) -> float:
        """How long the step, or the command between two, that is under way has taken so far; else 0."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def die(self, error: EngineDead) -> None:
        """Ends everything, from any thread: for a step that hangs, too."""
        with self._lock:
            if self.error is not None:
                return
            self.error = error
            awaited, self._awaited = self._awaited, set()
        for future in awaited:
            if future.running() or future.set_running_or_notify_cancel():
                future.set_exception(EngineDead(*error.args))
        self._listener.died(error)

    def close(self, timeout: float = 30.0) -> None:
        """Ends the thread after the step under way, and the engine with it. A step that hangs is left behind."""
        with self._lock:
            self._closed = True
        self._commands.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.error("the engine's thread hangs in a step and is left behind")
        else:
            self.engine.close()

    def _run(self) -> None:
        loop = self.engine.loop
        try:
            while self._obey(None if not loop.has_unfinished else LOAD_POLL_S if loop.awaits_load else 0.0):
                if self.error is not None:  # `die` has failed whatever is asked for
                    return
                if loop.has_unfinished:
                    self._step()
        except BaseException as error:  # a bug: nobody may wait for this thread any more
            logger.critical("the engine's thread failed", exc_info=error)
            self.die(EngineDead(f"the engine's thread failed: {error!r}"))

    def _obey(self, timeout: float | None) -> bool:
        """Executes what is asked for; waits up to `timeout` seconds (None: for ever) for the first. False: the thread ends."""
        while True:
            try:
                item = self._commands.get(timeout=timeout) if timeout != 0.0 else self._commands.get_nowait()
            except queue.Empty:
                return True
            if item is None:
                return False
            self._execute(*item)
            timeout = 0.0

    def _execute(self, command: Callable[[Engine], Any], future: Future[Any]) -> None:
        with self._lock:
            if self.error is not None:
                return
            if not future.set_running_or_notify_cancel():
                self._awaited.discard(future)
                return
        self._step_began = time.monotonic()
        result: Any = None
        failure: BaseException | None = None
        try:
            result = command(self.engine)
        except BaseException as error:
            failure = error
        finally:
            self._step_began = None
        with self._lock:
            if future not in self._awaited:  # `die` has failed it
                return
            self._awaited.discard(future)
        if failure is None:
            future.set_result(result)
        else:
            future.set_exception(failure)

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
            self._listener.loaded(loads.popleft())
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
        updates = [Update.of(request) for request in dict.fromkeys(requests)]
        if updates and self.error is None:
            self._listener.updated(updates)
