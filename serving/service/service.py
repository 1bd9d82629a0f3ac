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

from chameleon_jax.checkpoints.chat_template import ChatTemplate, operators_template
from chameleon_jax.errors import Draining, Forbidden, RequestFailed, Unauthenticated
from chameleon_jax.sampling_params import LoRAMix, LoRARequest
from chameleon_jax.serving.async_llm import AsyncLLM
from chameleon_jax.serving.deadline import Deadline
from chameleon_jax.serving.service.adapter_sources import AdapterSources
from chameleon_jax.serving.service.load_on_request import LoadOnRequest
from chameleon_jax.serving.service.server_config import MAX_NAME_LEN, ServerConfig
from chameleon_jax.serving.tools.call_parser import CallParser
from chameleon_jax.serving.tools.styles import STYLES, guess_style

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
        self.sources = sources or AdapterSources(config.adapter_dirs, config.hub_adapters, config.adapter_urls)
        self._template: ChatTemplate | None = None
        if config.chat_template is not None and llm.tokenizer is not None:
            self._template = llm.tokenizer.make_chat_template(*operators_template(config.chat_template))
        self._requested = LoadOnRequest(llm, self.sources)

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

    async def check_model(self, model: str | None) -> None:
        """Raise KeyError for a model that no request may name. Loads nothing."""
        if model is None or not self._may_load(model) or not await self._requested.can_load(model):
            self.lora_named(model)

    def is_lora(self, name: str) -> bool:
        """Whether an adapter has that name."""
        return self.llm.engine.adapters.get(name) is not None

    async def adapter_of(self, model: str | None, mixed: Sequence[tuple[str, float]], deadline: Deadline) -> LoRARequest | None:
        """Adapter of a request, loaded first where it is one of the server's sources; None for the base model.

        Args:
            model: The base model or an adapter.
            mixed: Names and weights of several adapters in the place of one.
            deadline: Deadline of the request.

        Raises:
            KeyError: An adapter does not exist.
            ValueError: An adapter cannot be served, or `mixed` is wrong.
            Draining, DeadlineExceeded, QueueFull, RequestFailed, EngineDead: See `chameleon_jax.errors`.
        """
        is_base = model is None or model in ("", *self.model_names)
        if mixed and not is_base:
            allowed = " or ".join(map(repr, self.model_names))
            raise ValueError(f"model is {reprlib.repr(model)}; allowed with lora: {allowed}, the base model")
        lora: LoRARequest | None = None if is_base else LoRARequest(str(model))
        if mixed:  # a wrong one is refused before anything is loaded
            lora = LoRAMix([LoRARequest(name) for name, _ in mixed], [weight for _, weight in mixed])
        names = [] if lora is None else [member.name for member, _ in lora.members]
        for name in names:
            if name in ("", *self.model_names):
                raise ValueError(f"lora has {name!r}; allowed: adapters, not the base model")
        async with deadline.kept():
            for name in names:
                if self._may_load(name):
                    await self._requested.load(name)
        for name in names:
            self.lora_named(name)
        return lora

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
        return (self._template or tokenizer.chat_template).error

    @property
    def tool_style(self) -> type[CallParser]:
        """Style in which the model writes tool calls: the server's setting, else guessed."""
        name, tokenizer = self.config.tool_call_parser, self.llm.tokenizer
        if name is None and tokenizer is not None:
            name = guess_style((self._template or tokenizer.chat_template).text, tokenizer.has_token)
        return STYLES[name or "hermes"]

    async def chat_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        add_special_tokens: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Format a conversation as the token ids of a prompt.

        Args:
            messages: Messages, each with a role and content.
            add_generation_prompt: End with the start of the assistant's turn.
            continue_final_message: End where the last message's text ends.
            chat_template: Template to use instead of the server's or the model's.
            add_special_tokens: Put the tokenizer's own special tokens around the text.
            variables: Further variables of the template.

        Raises:
            ValueError: There is no template, or it refuses the messages.
        """
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            raise ValueError(f"messages: {self.chat_error}")
        template = self._template or tokenizer.chat_template
        if chat_template is not None:
            template = await asyncio.to_thread(tokenizer.make_chat_template, chat_template, "chat_template of the request")
        text = await asyncio.to_thread(template.render, messages, add_generation_prompt, continue_final_message, variables)
        return await self.llm.prompts.read(text, add_special_tokens)

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
        """Unload an adapter. Requests that use it finish; then its memory is freed. Raises KeyError.

        One of an adapter directory is loaded again when a request names it, unless `load_on_request` is off.
        """
        await self.llm.remove_lora(name)
        logger.info("unloaded adapter %r", name)

    def _may_load(self, name: str) -> bool:
        """Whether a request that names an adapter may load it: it is none yet."""
        return self.config.load_on_request and self._may_name(name) and not self.is_lora(name)

    def _may_name(self, name: str) -> bool:
        """Whether an adapter may have the name."""
        return 0 < len(name) <= MAX_NAME_LEN and name.isprintable() and name not in self.model_names

    def _check_name(self, name: str) -> None:
        if not self._may_name(name):
            raise ValueError(
                f"lora_name is {reprlib.repr(name)}; allowed: 1 to {MAX_NAME_LEN} printable characters, "
                "but no name of the base model"
            )


def _is_one_of(key: str, keys: Sequence[str]) -> bool:
    """Compare in time that depends neither on which key matches, nor on how much of one does."""
    found = [hmac.compare_digest(key.encode(), known.encode()) for known in keys]
    return any(found)
