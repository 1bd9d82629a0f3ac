"""The Python API for servers: an engine in its own thread, requests as asynchronous iterators."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from chameleon_jax.errors import Draining, DuplicateRequest, EngineDead
from chameleon_jax.executor import LoadResult
from chameleon_jax.outputs import RequestOutput
from chameleon_jax.sampling_params import LoRARequest, SamplingParams
from chameleon_jax.serving.adapter_reader import AdapterReader
from chameleon_jax.serving.deadline import Deadline
from chameleon_jax.serving.engine import Engine
from chameleon_jax.serving.engine_thread import EngineThread
from chameleon_jax.serving.llm import compile_progress, engine_config
from chameleon_jax.serving.observers import Observers
from chameleon_jax.serving.prompts import Prompt, PromptReader
from chameleon_jax.serving.request_stream import RequestStream
from chameleon_jax.serving.sampling_defaults import fit_max_tokens
from chameleon_jax.serving.stats import EngineStats, take_stats
from chameleon_jax.serving.turns import Turns
from chameleon_jax.serving.updates import Update

logger = logging.getLogger(__name__)

T = TypeVar("T")

STATS_TIMEOUT_S = 1.0


class AsyncLLM:
    """A model and its adapters, served to many callers at once. Everything may be called from any asyncio loop.

    Args:
        model: a preset's name, a GGUF file, a Hugging Face or Orbax directory, or a hub id.
        step_timeout: seconds after which a step counts as hung, and the engine as dead.
        max_lora_loads: adapters that are read and packed at once.
        max_lora_queue: adapters that may wait for that; more are refused with QueueFull.
        settings: fields of `EngineConfig`.

    Attributes:
        observers: may be added to, and are told what becomes of requests and loads.
        prompts: what prompts are to the model; reader: of adapters.
        last_stats: what `stats` returned last; what is left to say of an engine that is dead.

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
        self.observers = Observers()
        self._streams: dict[str, RequestStream] = {}
        self._ids = itertools.count()
        self._draining = False
        self.prompts = PromptReader(self.tokenizer, self.max_model_len)
        self.reader = AdapterReader(self.engine, max_lora_loads, max_lora_queue)
        self._turns = Turns()  # of adapters' names
        self.last_stats: EngineStats | None = None
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
            sampling_params: None: the model's defaults, with as many tokens as there is room for at most.
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
        params, fit = sampling_params or self.get_default_sampling_params(), sampling_params is None
        (stream,) = await self.open_all([prompt], [params], lora_request, request_id, Deadline(timeout), fit=fit)
        return stream

    async def open_all(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        lora_request: LoRARequest | None = None,
        request_id: str | None = None,
        deadline: Deadline | None = None,
        *,
        fit: bool = False,
    ) -> list[RequestStream]:
        """`open` of every prompt with each of `params`, prompt by prompt. All get in, with one content of the adapter, or none.

        Args:
            request_id: of the only request; of several, each adds its number.
            fit: cut max_tokens to the room behind each prompt, for callers that left them out.
        """
        arrival = self.engine.clock()
        deadline = deadline or Deadline(None)
        name = request_id or f"request-{next(self._ids)}"
        lora = None if lora_request is None else dataclasses.replace(lora_request, load_inplace=False)
        streams: list[RequestStream] = []
        wanted: list[SamplingParams] = []  # of each stream

        def submit(engine: Engine) -> None:
            taken: list[str] = []
            try:
                for stream, param in zip(streams, wanted):
                    stream.request = engine.submit(stream.prompt_token_ids, param, lora, stream.request_id, arrival)
                    taken.append(stream.request_id)
            except BaseException:
                for request_id in taken:
                    engine.loop.abort(request_id)
                raise

        async with deadline.kept():
            if lora_request is not None:
                await self._read_lora(lora_request)
            several = len(prompts) * len(params) > 1
            for prompt in prompts:
                token_ids = await self.prompts.read(prompt)
                text = prompt if isinstance(prompt, str) else None
                wanted += [fit_max_tokens(p, len(token_ids), self.max_model_len) for p in params] if fit else params
                for _ in params:
                    own = f"{name}-{len(streams)}" if several else name
                    streams.append(RequestStream(own, text, token_ids, lora_request, self.tokenizer, self._give_up))
            for stream in streams:
                if stream.request_id in self._streams:
                    raise DuplicateRequest(f"request_id is {stream.request_id!r}; a request of that id is running")
            if self._draining:
                raise Draining("the server is about to stop")
            self._streams.update({stream.request_id: stream for stream in streams})
            try:
                await self.call(submit)
            except BaseException:
                for stream in streams:
                    self._give_up(stream)  # it may have got in, if this was cancelled
                raise
        for stream in streams:
            stream.abort_at(deadline)
        return streams

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's, as its generation_config.json has them."""
        return self.engine.sampling_defaults.params()

    async def abort(self, request_id: str) -> bool:
        """Ends a request with finish reason "abort"; whether there was one."""
        return await asyncio.wrap_future(self._thread.abort(request_id))

    def _give_up(self, stream: RequestStream) -> None:
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
            self._thread.abort(stream.request_id)  # nothing where it has ended

    # -- adapters -------------------------------------------------------------------------------------------------------

    async def add_lora(self, name: str, path: str | Path, pinned: bool | None = None, *, load_inplace: bool = True) -> bool:
        """Reads a PEFT adapter and names it, while requests run; a name that exists is given the new content, and running
        requests keep the old. Calls for one name take effect in the order in which they are made.

        Args:
            pinned: whether the name keeps it in the pool; None: as before, and a new name does not.
            load_inplace: False refuses other content for a name that exists.

        Returns:
            Whether the name had that very content already.

        Raises:
            ValueError: the adapter cannot be served; says why. Nothing has changed then. QueueFull, EngineDead.
        """
        async with self._turns.of(name):
            return await self._add_lora(name, path, pinned, load_inplace)

    async def _add_lora(self, name: str, path: str | Path, pinned: bool | None = None, load_inplace: bool = True) -> bool:
        packed = await self.reader.read(name, path)
        return await self.call(lambda engine: engine.name_lora(name, packed, path, pinned, load_inplace))

    async def _read_lora(self, lora: LoRARequest) -> None:
        """Reads the adapter of a request where that must be, once for all requests that wait for it."""
        if lora.path is None or not self.engine.must_read(lora):
            return
        async with self._turns.of(lora.name):
            if self.engine.must_read(lora):
                await self._add_lora(lora.name, lora.path)

    async def remove_lora(self, name: str) -> None:
        """Requests that use it finish; then its memory is free. Raises KeyError."""
        async with self._turns.of(name):
            await self.call(lambda engine: engine.remove_lora(name))

    async def list_loras(self) -> list[str]:
        return await self.call(lambda engine: engine.list_loras())

    async def pin_lora(self, name: str, pinned: bool = True) -> None:
        """Keeps an adapter in the pool once it is there. Raises ValueError or KeyError."""
        async with self._turns.of(name):
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
        """What the engine says of itself; the last known where it does not answer within a second. Raises EngineDead."""
        last = self.last_stats
        if last is not None and self.error is None and time.monotonic() - self._stats_at <= max_age:
            return last
        try:
            async with asyncio.timeout(None if last is None else STATS_TIMEOUT_S):
                last = self.last_stats = await self.call(take_stats)
                self._stats_at = time.monotonic()
        except TimeoutError:
            assert last is not None
        return last

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
            stream.loop.call_soon_threadsafe(stream.abort, Draining("the server stopped before the request was done"))
        while self._streams and self.error is None and loop.time() < end + 5.0:
            await asyncio.sleep(0.02)  # until their readers have seen it
        return not left

    def close(self) -> None:
        """Ends the threads, and every request that is left."""
        self._thread.die(EngineDead("the engine is closed"))
        self._closed.set()
        self._thread.close()
        self._watchdog.join()
        self.reader.close()
        self.prompts.close()

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
        by_loop: dict[asyncio.AbstractEventLoop, deque[tuple[RequestStream, Update]]] = {}
        for update in updates:
            request = update.request
            stream = self._streams.get(request.request_id)
            if stream is not None and stream.request is request:  # not one before it of the same id
                pairs = by_loop.setdefault(stream.loop, deque())
                if update.num_tokens and not stream.has_begun:
                    stream.has_begun = True
                    self.observers.first_token(request)
                    pairs.appendleft((stream, update))  # nobody waits for a first token longer than for its step
                else:
                    pairs.append((stream, update))
            if update.finished:
                self.observers.finished(request)
        for loop, pairs in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self._deliver, pairs)

    def loaded(self, result: LoadResult) -> None:
        self.observers.loaded(result)

    def died(self, error: EngineDead) -> None:
        left = list(self._streams.values())
        self.observers.lost(len(left))
        for stream in left:
            with contextlib.suppress(RuntimeError):
                stream.loop.call_soon_threadsafe(stream.fail, error)

    def _deliver(self, pairs: Iterable[tuple[RequestStream, Update]]) -> None:
        for stream, update in pairs:
            stream.deliver(update)
            if update.finished and self._streams.get(stream.request_id) is stream:
                del self._streams[stream.request_id]
