"""Rules that HTTP and gRPC share: access by keys, names of models and adapters, deadlines and chat prompts."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import reprlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chameleon_jax.errors import Draining, Forbidden, RequestFailed, Unauthenticated
from chameleon_jax.sampling_params import LoRARequest
from chameleon_jax.serving.async_llm import AsyncLLM
from chameleon_jax.serving.deadline import Deadline
from chameleon_jax.serving.service.adapter_sources import AdapterSources
from chameleon_jax.serving.service.server_config import MAX_NAME_LEN, ServerConfig

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""Ids that a client may give to its requests."""


class Service:
    """One engine, as both protocols serve it.

    Args:
        llm: The engine.
        config: Settings of the server.
        sources: Places of adapters; None makes them of `config`.

    Attributes:
        model_names: Names of the base model in requests.
        model_name: The first of them, which answers and metrics have.
        created: Unix time at which serving started, seconds.
        sampling_defaults: Values of `SamplingParams` fields that requests leave out.
    """

    def __init__(self, llm: AsyncLLM, config: ServerConfig, sources: AdapterSources | None = None):
        self.llm = llm
        self.config = config
        self.model_names = config.served_model_name or (Path(llm.engine.model_name).name,)
        self.model_name = self.model_names[0]
        self.created = int(time.time())
        self.sampling_defaults = llm.engine.sampling_defaults.values
        self.sources = sources or AdapterSources(config.adapter_dirs, config.hub_adapters)

    # -- access ---------------------------------------------------------------------------------------------------------

    def check_access(self, authorization: str | None, admin: bool = False) -> None:
        """Check the key of a request.

        Args:
            authorization: The request's header, `Bearer KEY`. None without one.
            admin: Whether the request needs an admin key.

        Raises:
            Unauthenticated: The key is missing or wrong.
            Forbidden: The key is valid, but no admin key.
        """
        config = self.config
        if not config.api_keys and not config.admin_keys:
            return
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            key = ""
        if _is_one_of(key, config.admin_keys):
            return
        known = _is_one_of(key, config.api_keys)
        if not known and (config.api_keys or admin):
            raise Unauthenticated(
                "the API key is missing or wrong; allowed: 'authorization: Bearer KEY' with a key of this server"
            )
        if admin:
            raise Forbidden("loading and unloading adapters requires an admin key")

    # -- requests -------------------------------------------------------------------------------------------------------

    def lora_named(self, model: str | None) -> LoRARequest | None:
        """Adapter that a request's `model` names, None for the base model. Raises KeyError for an unknown name."""
        if model is None or model in ("", *self.model_names):
            return None
        if not self.is_lora(model):
            raise KeyError(f"the model {reprlib.repr(model)} does not exist; see the list of models")
        return LoRARequest(model)

    def is_lora(self, name: str) -> bool:
        """Whether an adapter has that name."""
        return self.llm.engine.adapters.get(name) is not None

    def deadline(self, timeout: float | None) -> Deadline:
        """Deadline of a request arriving now. Args: timeout: seconds, at most and by default the server's `request_timeout`."""
        most = self.config.request_timeout
        return Deadline(most if timeout is None else min(timeout, most))

    @property
    def chat_error(self) -> str | None:
        """Reason why chat requests are refused, None where they are served."""
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            return "the model has no tokenizer (load_format='dummy'), so it cannot chat"
        return tokenizer.chat_template.error

    async def chat_tokens(self, messages: Sequence[Mapping[str, str]], /, **options: Any) -> list[int]:
        """Format a conversation as the token ids of a prompt. Args: options: of `apply_chat_template`. Raises ValueError."""
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            raise ValueError(f"messages: {self.chat_error}")
        text = await asyncio.to_thread(tokenizer.apply_chat_template, messages, **options)
        return await self.llm.prompts.read(text, add_special_tokens=False)

    # -- adapters -------------------------------------------------------------------------------------------------------

    async def load_named(self, adapters: dict[str, str]) -> None:
        """Load the adapters that the operator named, then all others in the adapter directories.

        An adapter of a directory that cannot be served is logged and left out.

        Args:
            adapters: Path of each named adapter.

        Raises:
            ValueError: A named adapter cannot be served.
            EngineDead: The engine died meanwhile.
        """
        begin = time.perf_counter()
        for name, path in adapters.items():
            try:
                self._check_name(name)
                await self.llm.add_lora(name, path)
            except (ValueError, RequestFailed) as error:
                raise ValueError(f"adapter {name!r}, {path}: {error}") from error
        found = self.sources.found()
        for name, directory in found.items():
            if name in adapters:
                continue
            try:
                self._check_name(name)
                await self.llm.add_lora(name, self.sources.resolve(str(directory)))
            except (ValueError, RequestFailed) as error:
                logger.warning("adapter %r in an adapter directory is left out: %s", name, error)
        num_found, num_read = len(adapters | found), len(await self.llm.list_loras())
        logger.info("%d adapters are found and %d registered, in %.1f s", num_found, num_read, time.perf_counter() - begin)

    async def load_lora(self, name: str, source: str, pinned: bool | None = None, load_inplace: bool = True) -> bool:
        """Load an adapter for a client. Returns whether the name had the same content before. Raises as `AsyncLLM.add_lora`."""
        self._check_name(name)
        if self.llm.draining:
            raise Draining("the server is about to stop")
        path = await asyncio.to_thread(self.sources.resolve, source)
        loaded = await self.llm.add_lora(name, path, pinned, load_inplace=load_inplace)
        logger.info("loaded adapter %r", name)
        return loaded

    async def unload_lora(self, name: str) -> None:
        """Unload an adapter. Requests that use it finish; then its memory is freed. Raises KeyError."""
        await self.llm.remove_lora(name)
        logger.info("unloaded adapter %r", name)

    def _check_name(self, name: str) -> None:
        if not name or len(name) > MAX_NAME_LEN or not name.isprintable() or name in self.model_names:
            raise ValueError(
                f"lora_name is {reprlib.repr(name)}; allowed: 1 to {MAX_NAME_LEN} printable characters, "
                "but no name of the base model"
            )


def _is_one_of(key: str, keys: Sequence[str]) -> bool:
    """Compare in time that depends neither on which key matches, nor on how much of one does."""
    found = [hmac.compare_digest(key.encode(), known.encode()) for known in keys]
    return any(found)
