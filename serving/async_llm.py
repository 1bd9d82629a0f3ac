"""Python API for servers: an engine in a thread of its own, requests as asynchronous iterators."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, Unpack

from chameleon_jax.config import EngineSettings
from chameleon_jax.errors import Draining, EngineDead
from chameleon_jax.outputs import RequestOutput
from chameleon_jax.sampling_params import LoRARequest, SamplingParams, StructuredOutputsParams
from chameleon_jax.serving.adapter_reader import AdapterReader
from chameleon_jax.serving.deadline import Deadline
from chameleon_jax.serving.engine import LLMEngine
from chameleon_jax.serving.engine_thread import EngineThread
from chameleon_jax.serving.open_engine import compile_progress, open_engine
from chameleon_jax.serving.open_streams import OpenStreams
from chameleon_jax.serving.prompts import Prompt, PromptReader
from chameleon_jax.serving.request_stream import RequestStream
from chameleon_jax.serving.stats import EngineStats, take_stats
from chameleon_jax.serving.telemetry import trace_context
from chameleon_jax.serving.watchdog import Watchdog

T = TypeVar("T")

STATS_TIMEOUT_S = 1.0
"""Seconds after which `stats` answers with the last ones: a step takes long, or hangs."""


class AsyncLLM:
    """A model and its adapters, served to many callers at once. Its methods may be called from any asyncio loop.

    Args:
        model: Name of a preset, a GGUF file, a Hugging Face or Orbax directory, or a hub id. Or an engine that is built, which
            `close` leaves open.
        progress: Told how many programs are compiled.
        step_timeout: Seconds after which a step counts as hung, and the engine as dead; the programs that it compiles count.
        max_lora_loads: Adapters that are read and packed at a time.
        max_lora_queue: Adapters that may wait for that. More are refused with QueueFull.
        settings: Fields of `EngineConfig`.

    Attributes:
        observers: Told of requests and loads; append an `Observer` to it.
        prompts: Turns prompts into token ids.
        reader: Reads adapters.
        draining: Whether `drain` was called: no request is taken in any more.
        last_stats: Latest return of `stats`, which outlives the engine.

    Raises:
        ValueError: The model cannot be served or a setting is wrong; names it.
    """

    def __init__(
        self,
        model: str | LLMEngine,
        *,
        progress: Callable[[int, int], None] = compile_progress,
        step_timeout: float = 300.0,
        max_lora_loads: int = 2,
        max_lora_queue: int = 64,
        **settings: Unpack[EngineSettings],
    ):
        self.engine, self._owns_engine = open_engine(model, settings, progress)
        self.tokenizer = self.engine.tokenizer
        self.model_config = self.engine.model_config
        self.max_model_len = self.engine.max_model_len
        self._streams = OpenStreams()
        self.observers = self._streams.observers
        self._ids = itertools.count()
        self.draining = False
        self.prompts = PromptReader(self.tokenizer, self.max_model_len)
        self.last_stats: EngineStats | None = None
        self._stats_at = 0.0
        self._thread = EngineThread(self.engine, self._streams)
        self.reader = AdapterReader(self._thread, max_lora_loads, max_lora_queue)
        self._watchdog = Watchdog(self._thread, step_timeout)

    # -- requests -------------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        lora_request: LoRARequest | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Complete one prompt. Yields all output so far whenever there is more; leaving the iteration aborts the request.

        Args:
            prompt: Text, token ids, or `{"prompt_token_ids": [...]}`.
            sampling_params: None takes the model's defaults, with max_tokens up to the room behind the prompt.
            lora_request: Adapter of the request; None is the base model.
            request_id: An id that no unfinished request has; None makes one.
            timeout: Seconds from now within which the last token must come.
            priority: Class of the request, a signed 64-bit integer. Lower ones start first.

        Raises:
            ValueError: The prompt or a parameter is wrong.
            KeyError: No adapter of that name is registered.
            QueueFull, Draining, DeadlineExceeded, RequestFailed, EngineDead: See `chameleon_jax.errors`.
        """
        async with await self.open(prompt, sampling_params, lora_request, request_id, timeout, priority) as stream:
            async for _ in stream:
                yield stream.output()

    async def open(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        lora_request: LoRARequest | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
        priority: int = 0,
    ) -> RequestStream:
        """Take a request in and return its stream, for callers that want new output only instead of all so far.

        Args and errors are as for `generate`.
        """
        params, fit = sampling_params or self.get_default_sampling_params(), sampling_params is None
        deadline = Deadline(timeout)
        (stream,) = await self.open_all([prompt], [params], lora_request, request_id, deadline, fit=fit, priority=priority)
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
        priority: int = 0,
        prompt_only: bool = False,
    ) -> list[RequestStream]:
        """Open every prompt with each of `params`, prompt by prompt.

        All requests are taken in, with one content of the adapter, or none is.

        Args:
            prompts: Text or token ids.
            params: Sampling parameters of each choice.
            lora_request: Adapter of all; None is the base model.
            deadline: Deadline of all.
            request_id: Id of the only request. Several append their number to it.
            fit: Cut max_tokens to the room behind each prompt, for callers that left max_tokens out.
            priority: Class of all.
            prompt_only: Whether the callers drop the output, of one token each, and a prompt may take the whole context.
        """
        arrival = self.engine.clock()
        deadline = deadline or Deadline(None)
        name = request_id or f"request-{next(self._ids)}"
        lora = None if lora_request is None else lora_request.known()
        trace = trace_context.current()
        streams: list[RequestStream] = []
        wanted: list[SamplingParams] = []  # one for each stream

        def submit(engine: LLMEngine) -> None:
            taken: list[str] = []
            try:
                for stream, param in zip(streams, wanted):
                    own_id, token_ids = stream.request_id, stream.prompt_token_ids
                    stream.request = engine.submit(token_ids, param, lora, own_id, arrival, priority, prompt_only)
                    stream.request.trace_context = trace
                    taken.append(stream.request_id)
            except BaseException:
                for request_id in taken:
                    engine.loop.abort(request_id)
                raise

        async with deadline.kept():
            if lora_request is not None:
                await self.reader.prepare(lora_request)
            for language in {param.structured_outputs for param in params if param.structured_outputs is not None}:
                await asyncio.to_thread(self._compile, language)
            several = len(prompts) * len(params) > 1
            for prompt in prompts:
                token_ids = await self.prompts.read(prompt)
                text = prompt if isinstance(prompt, str) else None
                wanted += [p.fit(len(token_ids), self.max_model_len) for p in params] if fit else params
                for _ in params:
                    own = f"{name}-{len(streams)}" if several else name
                    streams.append(RequestStream(own, text, token_ids, lora_request, self.tokenizer, self._give_up))
            if self.draining:
                raise Draining("the server is about to stop")
            self._streams.add(streams)
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
        """Return the sampling parameters of the model's generation_config.json."""
        return self.engine.sampling_defaults.params()

    def _compile(self, language: StructuredOutputsParams) -> None:
        """Compile a grammar, which the engine then finds compiled. Raises InvalidGrammar."""
        self.engine.grammars.guide(language)

    async def abort(self, request_id: str) -> bool:
        """End a request with finish reason "abort". Returns whether one of that id was unfinished."""
        return await asyncio.wrap_future(self._thread.abort(request_id))

    def _give_up(self, stream: RequestStream) -> None:
        if self._streams.remove(stream):
            self._thread.abort(stream.request_id)  # nothing where it has ended

    # -- adapters -------------------------------------------------------------------------------------------------------

    async def add_lora(
        self,
        name: str,
        path: str | Path | None = None,
        pinned: bool | None = None,
        *,
        weights: Any = None,
        peft_config: Any = None,
        load_inplace: bool = True,
    ) -> bool:
        """Read a PEFT adapter, or take one from memory, and give it a name, while requests run.

        A name that exists gets the new content; running requests keep the old. Calls for one name take effect in order.

        Args:
            name: A new name, or one that gets new content.
            path: Directory or URL of the adapter.
            pinned: Whether the name keeps it in the pool. None keeps the name's pin; a new name has none.
            weights: The adapter in memory, in the place of `path`; see `LLMEngine.add_lora`. It is read until the call returns.
            peft_config: Settings of `weights`.
            load_inplace: False refuses other content for a name that exists.

        Returns:
            Whether the name had that very content already.

        Raises:
            ValueError: The adapter cannot be served; says why. Nothing has changed then.
            QueueFull, EngineDead: See `chameleon_jax.errors`.
        """
        job = self.engine.packer.job(name, path, weights, peft_config)
        return await self.reader.add(name, job, path, pinned, load_inplace)

    async def remove_lora(self, name: str) -> None:
        """Forget a name. Requests that came with it finish; then its memory is free. Raises KeyError."""
        async with self.reader.turns.of(name):
            await self.call(lambda engine: engine.remove_lora(name))

    async def list_loras(self) -> list[str]:
        """Names of all adapters, sorted."""
        return await self.call(lambda engine: engine.list_loras())

    async def pin_lora(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter in the pool once it is there, or stop to. Raises ValueError or KeyError."""
        async with self.reader.turns.of(name):
            await self.call(lambda engine: engine.pin_lora(name, pinned))

    # -- state ----------------------------------------------------------------------------------------------------------

    @property
    def error(self) -> EngineDead | None:
        """Cause of the engine's death; None while it lives."""
        return self._thread.error

    async def stats(self, max_age: float = 0.1) -> EngineStats:
        """Snapshot of the engine's state; the last known one where the engine does not answer within a second.

        Args:
            max_age: Seconds for which the last snapshot is good enough.

        Raises:
            EngineDead: The engine is dead.
        """
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

    async def call(self, command: Callable[[LLMEngine], T]) -> T:
        """Run `command` on the engine's thread, between two steps. Raises EngineDead, and the command's errors."""
        return await asyncio.wrap_future(self._thread.call(command))

    async def drain(self, timeout: float) -> bool:
        """Take no more requests in, and wait for those that run.

        Args:
            timeout: Seconds after which those that are left are aborted.

        Returns:
            Whether all ended by themselves.
        """
        self.draining = True
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

    def close(self) -> bool:
        """End the threads, and every request that is left.

        Returns:
            Whether the engine's thread has ended. One that hangs in a step is left behind, with its engine.
        """
        self._thread.die(EngineDead("the engine is closed"))
        self._watchdog.close()
        ended = self._thread.close()
        if ended and self._owns_engine:
            self.engine.close()
        elif ended:
            for request in self.engine.loop.unfinished:
                self.engine.loop.abort(request.request_id)
        self.reader.close()
        self.prompts.close()
        return ended

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.close)
