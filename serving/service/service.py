"""What the HTTP and the gRPC server have in common: who may do what, what names mean, and what a request may ask for."""

from __future__ import annotations

import asyncio
import hmac
import logging
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
from chameleon_jax.serving.service.server_config import ServerConfig

logger = logging.getLogger(__name__)

MAX_NAME_LEN = 256


class Service:
    """One engine as both servers offer it.

    Attributes:
        model_name: what requests call the base model.
        created: Unix time of the start, seconds.
        sampling_defaults: values of fields of `SamplingParams` that requests leave out.
    """

    def __init__(self, llm: AsyncLLM, config: ServerConfig):
        self.llm = llm
        self.config = config
        self.model_name = config.served_model_name or Path(llm.engine.model_name).name
        self.created = int(time.time())
        self.sampling_defaults = llm.engine.sampling_defaults.values
        self.sources = AdapterSources(config.adapter_dirs, config.hub_adapters)

    # -- access ---------------------------------------------------------------------------------------------------------

    def check_access(self, authorization: str | None, admin: bool = False) -> None:
        """Args: authorization: `Bearer KEY`, as it came. Raises Unauthenticated or Forbidden."""
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
            raise Unauthenticated("no valid key was given; allowed: 'authorization: Bearer KEY' with a key of this server")
        if admin:
            raise Forbidden("loading and unloading adapters needs an admin key")

    # -- requests -------------------------------------------------------------------------------------------------------

    def lora_named(self, model: str | None) -> LoRARequest | None:
        """The adapter that a request's `model` names; None: the base model. Raises KeyError where there is no such name."""
        if model is None or model in ("", self.model_name):
            return None
        if self.llm.engine.adapters.get(model) is None:
            raise KeyError(f"the model {reprlib.repr(model)} does not exist; see the list of models")
        return LoRARequest(model)

    def deadline(self, timeout: float | None) -> Deadline:
        """Of a request that comes now. Args: timeout: seconds; None or more than the server's `request_timeout`: that."""
        most = self.config.request_timeout
        return Deadline(most if timeout is None else min(timeout, most))

    @property
    def chat_error(self) -> str | None:
        """Why conversations are refused; None where they are not."""
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            return "the model has no tokenizer (load_format='dummy'), so it cannot chat"
        return tokenizer.chat_template.error

    async def chat_tokens(self, messages: Sequence[Mapping[str, str]], /, **options: Any) -> list[int]:
        """A conversation as the token ids of a prompt. Args: options: of `apply_chat_template`. Raises ValueError."""
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            raise ValueError(f"messages: {self.chat_error}")
        text = await asyncio.to_thread(tokenizer.apply_chat_template, messages, **options)
        return await self.llm.prompts.read(text, add_special_tokens=False)

    # -- adapters -------------------------------------------------------------------------------------------------------

    async def load_named(self, adapters: dict[str, str]) -> None:
        """What the operator named, and what is in the adapter directories. Raises ValueError for the former; what cannot be
        served of the latter is logged, whatever the reason, unless the engine is dead."""
        for name, path in adapters.items():
            try:
                self._check_name(name)
                await self.llm.add_lora(name, path)
            except (ValueError, RequestFailed) as error:
                raise ValueError(f"adapter {name!r}, {path}: {error}") from error
        for name, directory in self.sources.found().items():
            if name in adapters:
                continue
            try:
                self._check_name(name)
                await self.llm.add_lora(name, self.sources.resolve(str(directory)))
            except (ValueError, RequestFailed) as error:
                logger.warning("adapter %r of an adapter directory is left out: %s", name, error)

    async def load_lora(self, name: str, source: str, pinned: bool | None = None, load_inplace: bool = True) -> bool:
        """Loads what a client named. Returns whether the name had that very content already. Raises as `AsyncLLM.add_lora`."""
        self._check_name(name)
        if self.llm.draining:
            raise Draining("the server is about to stop")
        path = await asyncio.to_thread(self.sources.resolve, source)
        loaded = await self.llm.add_lora(name, path, pinned, load_inplace=load_inplace)
        logger.info("adapter %r is loaded", name)
        return loaded

    async def unload_lora(self, name: str) -> None:
        """Raises KeyError."""
        await self.llm.remove_lora(name)
        logger.info("adapter %r is unloaded", name)

    def _check_name(self, name: str) -> None:
        if not name or len(name) > MAX_NAME_LEN or not name.isprintable() or name == self.model_name:
            raise ValueError(
                f"lora_name is {reprlib.repr(name)}; allowed: 1 to {MAX_NAME_LEN} printable characters, "
                "but not the base model's name"
            )


def _is_one_of(key: str, keys: Sequence[str]) -> bool:
    """Takes as long whichever of the keys it is, and however much of one is right."""
    found = [hmac.compare_digest(key.encode(), known.encode()) for known in keys]
    return any(found)
