"""The Python API for servers: an engine in its own thread, requests as asynchronous iterators."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from chameleon_jax.request import LoRARequest, Request, RequestOutput, SamplingParams
from chameleon_jax.serving.engine import Engine, PackedAdapter
from chameleon_jax.serving.engine_thread import EngineThread
from chameleon_jax.serving.errors import DeadlineExceeded, Draining, EngineDead, QueueFull
from chameleon_jax.serving.executor import LoadResult
from chameleon_jax.serving.llm import Prompt, compile_progress, engine_config, tokens_of
from chameleon_jax.serving.outputs import Update
from chameleon_jax.serving.request_stream import RequestStream
from chameleon_jax.serving.stats import EngineStats, take_stats

logger = logging.getLogger(__name__)

T = TypeVar("T")

LONG_PROMPT = 2000
"""Characters from which a prompt is tokenised in a thread: about a millisecond."""

STATS_TIMEOUT_S = 1.0


class Observer(Protocol):
    """Told by the engine's thread; returns at once."""

    def finished(self, request: Request) -> None:
        """A request ended, for whatever reason."""

    def loaded(self, result: LoadResult) -> None:
        """An adapter's load into the pool ended."""


class AsyncLLM:
    """A model and its adapters, served to many callers at once. Everything may be called from any asyncio loop.

    Args:
        model: a preset's name, a GGUF file, a Hugging Face or Orbax directory, or a hub id.
        step_timeout: seconds after which a step counts as hung, and the engine as dead.
        max_lora_loads: adapters that are read and packed at once.
        max_lora_queue: adapters that may wait for that; more are refused with QueueFull.
        settings: fields of `EngineConfig`.

    Raises:
        ValueError: naming what cannot be served, or the setting that is wrong.
    """

    def __init__(
        self,
        model: str,
        *,
        progress: Callable[[int, int], None] = compile_progress,
        step_timeout: float = 300.0,
        max_lora_loads: int = 2,
        max_lora_queue: int = 64,
        **settings: Any,
    ):
        self.engine = Engine(str(model), engine_config(settings), progress=progress)
        self.tokenizer = self.engine.tokenizer
        self.model_config = self.engine.model_config
        self.max_model_len = self.engine.max_model_len
        self.observers: list[Observer] = []
        self._streams: dict[str, RequestStream] = {}
        self._ids = itertools.count()
        self._draining = False
        self._max_lora_reads = max_lora_loads + max_lora_queue
        self.num_lora_reads = 0
        self._readers = ThreadPoolExecutor(max_lora_loads, thread_name_prefix="lora-reader")
        self._tokenizers = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._stats: EngineStats | None = None
        self._stats_at = 0.0
        self._thread = EngineThread(self.engine, self)
        self._closed = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, args=(step_timeout,), name="watchdog", daemon=True)
        self._watchdog.start()

    # -- requests -------------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        lora_request: LoRARequest | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Completes one prompt; yields all of it so far whenever there is more. Leaving the iteration aborts the request.

        Args:
            timeout: seconds from now within which the last token must come.

        Raises:
            ValueError, KeyError: a prompt, parameter or adapter is wrong.
            QueueFull, Draining, DeadlineExceeded, RequestFailed, EngineDead: see `serving.errors`.
        """
        async with await self.open(prompt, sampling_params, lora_request, request_id, timeout) as stream:
            async for _ in stream:
                yield stream.output()

    async def open(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        lora_request: LoRARequest | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> RequestStream:
        """Takes a request in and returns its stream, for callers that want what is new instead of everything so far.

        Raises as `generate` does what is wrong before the first token.
        """
        arrival = self.engine.clock()
        began = asyncio.get_running_loop().time()
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout is {timeout!r}; allowed: above 0 seconds")
        if lora_request is not None and lora_request.path is not None and self.engine.must_read(lora_request):
            await self.add_lora(lora_request.name, lora_request.path)
        text = prompt if isinstance(prompt, str) else None
        token_ids = await self.tokens_of(prompt)
        request_id = request_id or f"request-{next(self._ids)}"
        if request_id in self._streams:
            raise ValueError(f"request_id is {request_id!r}; a request of that id is running")
        if self._draining:
            raise Draining("the server is about to stop")
        params = sampling_params or SamplingParams()
        lora = None if lora_request is None else LoRARequest(lora_request.name)
        stream = RequestStream(request_id, text, token_ids, lora_request, self.tokenizer, self._give_up)

        def submit(engine: Engine) -> None:
            stream.request = engine.submit(token_ids, params, lora, request_id, arrival)

        self._streams[request_id] = stream
        try:
            await self.call(submit)
        except BaseException:
            self._give_up(stream)  # it may have got in, if this was cancelled
            raise
        if timeout is not None:
            spent = stream.loop.time() - began
            stream.abort_after(max(0.0, timeout - spent), DeadlineExceeded(f"the request took longer than {timeout:g} s"))
        return stream

    async def tokens_of(self, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt. Raises ValueError, without a look at a text that is too long to fit."""
        if not isinstance(prompt, str) or len(prompt) < LONG_PROMPT:
            return list(tokens_of(prompt, self.tokenizer, add_special_tokens))
        if self.tokenizer is not None and len(prompt) > (most := self.max_model_len * self.tokenizer.longest_token):
            raise ValueError(f"prompt has {len(prompt)} characters; allowed: {most}, as max_model_len is {self.max_model_len}")
        loop = asyncio.get_running_loop()
        job = functools.partial(tokens_of, prompt, self.tokenizer, add_special_tokens)
        return list(await loop.run_in_executor(self._tokenizers, job))

    async def abort(self, request_id: str) -> bool:
        """Ends a request with finish reason "abort"; whether there was one."""
        return await asyncio.wrap_future(self._thread.abort(request_id))

    def _give_up(self, stream: RequestStream) -> None:
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
            self._thread.abort(stream.request_id)  # nothing where it has ended

    # -- adapters -------------------------------------------------------------------------------------------------------

    async def add_lora(self, name: str, path: str | Path, pinned: bool = False) -> bool:
        """Reads a PEFT adapter and names it, while requests run; a name that exists is given the new content, and running
        requests keep the old.

        Returns:
            Whether the name had that very content already.

        Raises:
            ValueError: the adapter cannot be served; says why. Nothing has changed then. QueueFull, EngineDead.
        """
        if self.num_lora_reads >= self._max_lora_reads:
            raise QueueFull(f"{self.num_lora_reads} adapters are being loaded (max_lora_queue)")
        self.num_lora_reads += 1
        try:
            packed = await asyncio.get_running_loop().run_in_executor(self._readers, self.engine.read_lora, name, path)
        finally:
            self.num_lora_reads -= 1
        return await self.call(lambda engine: _name_lora(engine, name, packed, path, pinned))

    async def remove_lora(self, name: str) -> None:
        """Requests that use it finish; then its memory is free. Raises KeyError."""
        await self.call(lambda engine: engine.remove_lora(name))

    async def list_loras(self) -> list[str]:
        return await self.call(lambda engine: engine.list_loras())

    async def pin_lora(self, name: str, pinned: bool = True) -> None:
        """Keeps an adapter in the pool once it is there. Raises ValueError or KeyError."""
        await self.call(lambda engine: engine.pin_lora(name, pinned))

    # -- state ----------------------------------------------------------------------------------------------------------

    @property
    def error(self) -> EngineDead | None:
        """Why the engine is dead; None: it lives."""
        return self._thread.error

    @property
    def draining(self) -> bool:
        return self._draining

    async def stats(self, max_age: float = 0.1) -> EngineStats:
        """What the engine says of itself; the last known where it does not answer within a second."""
        if self._stats is None or time.monotonic() - self._stats_at > max_age:
            taking = asyncio.ensure_future(self.call(take_stats))
            done, _ = await asyncio.wait([taking], timeout=None if self._stats is None else STATS_TIMEOUT_S)
            if done and (self._stats is None or taking.exception() is None):
                self._stats, self._stats_at = taking.result(), time.monotonic()
            else:
                taking.cancel()
        assert self._stats is not None
        return self._stats

    async def call(self, command: Callable[[Engine], T]) -> T:
        """Has the engine's thread do something between two steps. Raises EngineDead, and what `command` raises."""
        return await asyncio.wrap_future(self._thread.call(command))

    async def drain(self, timeout: float) -> bool:
        """Takes nothing more in and waits for what runs; gives up what is left after `timeout` seconds. Whether all ended."""
        self._draining = True
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while self._streams and loop.time() < end and self.error is None:
            await asyncio.sleep(0.02)
        left = list(self._streams.values())
        for stream in left:
            error = DeadlineExceeded("the server stopped before the request was done")
            stream.loop.call_soon_threadsafe(stream.abort_after, 0.0, error)
        while self._streams and self.error is None and loop.time() < end + 5.0:
            await asyncio.sleep(0.02)  # until their readers have seen it
        return not left

    def close(self) -> None:
        """Ends the threads, and every request that is left."""
        self._thread.die(EngineDead("the engine is closed"))
        self._closed.set()
        self._thread.close()
        self._watchdog.join()
        self._readers.shutdown(cancel_futures=True)
        self._tokenizers.shutdown(cancel_futures=True)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.close)

    def _watch(self, step_timeout: float) -> None:
        while not self._closed.wait(min(1.0, step_timeout / 4)):
            if self._thread.step_seconds > step_timeout:
                logger.error("a step has taken more than %g s: the device hangs", step_timeout)
                self._thread.die(EngineDead(f"the device hangs: a step has taken more than {step_timeout:g} s"))

    # -- what the engine's thread tells ---------------------------------------------------------------------------------

    def updated(self, updates: list[Update]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, Update]]] = {}
        for update in updates:
            stream = self._streams.get(update.request.request_id)
            if stream is not None and stream.request is update.request:  # not one before it of the same id
                by_loop.setdefault(stream.loop, []).append((stream, update))
            if update.finished:
                self._tell_observers(lambda observer, request: observer.finished(request), update.request)
        for loop, pairs in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self._deliver, pairs)

    def loaded(self, result: LoadResult) -> None:
        self._tell_observers(lambda observer, load: observer.loaded(load), result)

    def died(self, error: EngineDead) -> None:
        for stream in list(self._streams.values()):
            with contextlib.suppress(RuntimeError):
                stream.loop.call_soon_threadsafe(stream.fail, error)

    def _deliver(self, pairs: Iterable[tuple[RequestStream, Update]]) -> None:
        for stream, update in pairs:
            stream.deliver(update)
            if update.finished and self._streams.get(stream.request_id) is stream:
                del self._streams[stream.request_id]

    def _tell_observers(self, tell: Callable[[Observer, T], None], news: T) -> None:
        for observer in self.observers:
            try:
                tell(observer, news)
            except Exception:
                logger.exception("an observer failed")


def _name_lora(engine: Engine, name: str, packed: PackedAdapter, path: str | Path, pinned: bool) -> bool:
    before = engine.registry.get(name)
    info = engine.name_lora(name, packed, path)
    if pinned:
        engine.pin_lora(name)
    return before is not None and before.content_hash == info.content_hash
