"""Adapters of the server's sources, loaded when a request first names them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from chameleon_jax.checkpoints.remote_adapter import MissingAdapter, StoreError
from chameleon_jax.errors import Draining, RequestFailed
from chameleon_jax.serving.async_llm import AsyncLLM
from chameleon_jax.serving.service.adapter_sources import AdapterSources

logger = logging.getLogger(__name__)

MISSING_S = 10.0
"""Seconds for which a name that no store has is not looked up again. Retries then cost a store little, and a person who has put
the adapter there meanwhile need not wait long."""

MAX_MISSING = 4096
"""Names that are remembered so; the oldest is forgotten first."""


class LoadOnRequest:
    """Loads adapters that requests name.

    Args:
        llm: Engine that serves them.
        sources: Places of adapters.
        clock: Seconds, monotonic.
    """

    def __init__(self, llm: AsyncLLM, sources: AdapterSources, clock: Callable[[], float] = time.monotonic):
        self._llm = llm
        self._sources = sources
        self._clock = clock
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._missing: dict[str, float] = {}  # time of the look-up, oldest first

    def __len__(self) -> int:
        """Count the loads under way."""
        return len(self._loads)

    async def can_load(self, name: str) -> bool:
        """Whether a request may name the adapter, as far as can be told without asking a hub or a store."""
        return not self._is_missing(name) and await asyncio.to_thread(self._sources.allows, name)

    async def load(self, name: str) -> None:
        """Load an adapter that has no name yet; nothing where no source has it.

        It is read once for all requests that wait for it, and also if they leave.

        Raises:
            ValueError: It cannot be served.
            RequestFailed: Its store or hub fails. The reason is in the log: it may tell of the operator's network.
            Draining, QueueFull, EngineDead: See `chameleon_jax.errors`.
        """
        if self._is_missing(name):
            return
        load = self._loads.get(name)
        if load is None:
            load = self._loads[name] = asyncio.create_task(self._load(name))
            load.add_done_callback(lambda load: self._end(name, load))
        await asyncio.shield(load)

    def _end(self, name: str, load: asyncio.Task[None]) -> None:
        del self._loads[name]
        if not load.cancelled():
            load.exception()  # which asyncio would log where every request has left

    async def _load(self, name: str) -> None:
        if self._llm.draining:
            raise Draining("the server is about to stop")
        try:
            path = await asyncio.to_thread(self._sources.find, name)
            if path is not None and await self._llm.reader.add_missing(name, path):
                logger.info("loaded adapter %r for a request", name)
        except MissingAdapter as error:
            logger.info("a request names %r, which is not there: %s", name, error)
            self._missing[name] = self._clock()
            if len(self._missing) > MAX_MISSING:
                del self._missing[next(iter(self._missing))]
        except StoreError as error:
            logger.warning("adapter %r cannot be loaded for a request: %s", name, error)
            raise RequestFailed(f"model {name!r} cannot be loaded: its source cannot be read now") from error
        except ValueError as error:
            raise ValueError(f"model {name!r} cannot be served: {error}") from error

    def _is_missing(self, name: str) -> bool:
        if self._clock() - self._missing.get(name, -math.inf) < MISSING_S:
            return True
        self._missing.pop(name, None)
        return False
