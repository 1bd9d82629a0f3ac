"""The engine: a checkpoint, compiled programs, and the loop that serves with them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chameleon_jax.config import EngineConfig
from chameleon_jax.errors import InvalidValue
from chameleon_jax.loop import ServingLoop
from chameleon_jax.memory.adapter_registry import AdapterRegistry
from chameleon_jax.memory.adapters import AdapterInfo
from chameleon_jax.models.adapters.against_base import resolve_against
from chameleon_jax.models.adapters.host_store import HostStore
from chameleon_jax.models.runtime.compilation import Progress
from chameleon_jax.models.runtime.executor import JaxExecutor
from chameleon_jax.models.runtime.jax_setup import enable_compilation_cache, take_device_memory
from chameleon_jax.request import Request, check_priority
from chameleon_jax.sampling_params import LoRAMix, LoRARequest, SamplingParams
from chameleon_jax.scheduler.length_predictor import LengthPredictor
from chameleon_jax.scheduler.stats import ProxyCounters
from chameleon_jax.serving.adapters import AdapterPacker, MixJob, PackedAdapter
from chameleon_jax.serving.compiled_model import CompiledModel
from chameleon_jax.serving.loaded_model import load_model
from chameleon_jax.serving.model_vocabulary import ModelVocabulary
from chameleon_jax.serving.proxy_predictor import ProxyPredictor, make_predictor
from chameleon_jax.serving.sampling_defaults import SamplingDefaults, generation_file
from chameleon_jax.systems import get_system

if TYPE_CHECKING:
    from chameleon_jax.structured_outputs import Grammars


class LLMEngine:
    """A model that serves, and its adapters by name. One thread owns it.

    Args:
        model: Name of a preset, a GGUF file, a Hugging Face or Orbax directory, or a hub id.
        progress: Told how many programs are compiled.
        clock: Seconds, monotonic.

    Attributes:
        built: Settings that programs are compiled for, every size filled in.
        config: Settings that it serves with now.
        loop: Its requests and scheduler; `loop.step()` advances them.
        packer: Reads adapters, from any thread.
        runner: Weights, pool and compiled programs.
        store: Packed adapters in host memory and on disk.
        vocabulary: Token ids of the model.

    Raises:
        ValueError: The checkpoint or the configuration cannot be served; says why.
    """

    def __init__(
        self,
        model: str,
        config: EngineConfig,
        *,
        progress: Progress = lambda done, total: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        generation_file(config.generation_config)  # wrong settings are refused before minutes of reading and compiling
        enable_compilation_cache()
        take_device_memory(config.gpu_memory_utilization)
        loaded = load_model(model, config)
        parts = _make_parts(config, loaded.generation_config, None)
        compiled = CompiledModel(loaded, config, progress)
        self.model_name = model
        self._resolve = functools.partial(resolve_against, model=loaded.weights)
        self.model_config, self.tokenizer = loaded.config, loaded.tokenizer
        self._generation_config = loaded.generation_config
        self.vocabulary = ModelVocabulary(loaded.config, loaded.tokenizer)
        self.dtype, self.layout, self.runner, self.built = compiled.dtype, compiled.layout, compiled.runner, compiled.settings
        self.store = HostStore(config.lora_host_bytes, stage=self.runner.stage)
        self._executor = self._make_executor()
        self._ids = itertools.count()
        self._start(self.built, clock, *parts)
        self.runner.compilation.start()

    def _start(
        self, config: EngineConfig, clock: Callable[[], float], defaults: SamplingDefaults, predictor: LengthPredictor
    ) -> None:
        """Make all that depends on settings which `restart` may change."""
        assert config.max_model_len is not None and config.num_pages is not None
        self.config = config
        self.clock = clock
        self.max_model_len = config.max_model_len
        self.num_pages = config.num_pages
        self.store.restart(config.lora_host_bytes)
        self._executor.restart(get_system(config.system).transfers_per_load)
        self.sampling_defaults = defaults
        self.packer = AdapterPacker(config, self.layout, self.dtype, self.num_pages, self._resolve, self.runner.stage)
        self._predictor = predictor
        self._seeds = random.Random(config.seed)
        self.loop = ServingLoop(
            config,
            self._executor,
            self.num_pages,
            page_tokens=self.layout.page_tokens,
            max_model_len=self.max_model_len,
            shapes=self.runner.buckets.step_shapes,
            clock=clock,
            predictor=self._predictor,
        )

    def restart(
        self, *, clock: Callable[[], float] | None = None, predictor: LengthPredictor | None = None, **changes: object
    ) -> None:
        """Serve with other settings over the programs that are compiled: from an empty pool, and with nothing learnt.

        Adapters keep their names, pins and host memory. Unfinished requests are aborted.

        Args:
            clock: Seconds, monotonic; None keeps the clock.
            predictor: Predictor of output lengths; None takes the one of the settings.
            changes: Fields of `EngineConfig`; the others are those that the engine was built with. Sizes can only be
                lowered, and some settings not changed (`config.COMPILED`, `config.LIMITS`).

        Raises:
            ValueError: A setting cannot be changed, or not to that. Nothing has changed then.
        """
        config = dataclasses.replace(self.built, **changes)  # type: ignore[arg-type]
        config.check_restart(self.built)
        self.adapters.check_restart(config)
        parts = _make_parts(config, self._generation_config, predictor)
        for request in self.loop.unfinished:
            self.loop.abort(request.request_id)
        self.loop.recover()
        adapters = self.adapters
        self._close_predictor()
        self._start(config, clock or self.clock, *parts)
        adapters.copy_to(self.adapters)

    def close(self) -> None:
        """End background threads and remove temporary files."""
        self.runner.compilation.close()
        self.store.close()
        self._close_predictor()

    @property
    def proxy_counters(self) -> ProxyCounters | None:
        """Copy of the length proxy's counters; None without a proxy."""
        return dataclasses.replace(self._predictor.counters) if isinstance(self._predictor, ProxyPredictor) else None

    # -- adapters -------------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> AdapterRegistry:
        """Adapters by name."""
        return self.loop.adapters

    def add_lora(
        self,
        name: str,
        path: str | Path | None = None,
        pinned: bool | None = None,
        *,
        weights: Any = None,
        peft_config: Any = None,
    ) -> AdapterInfo:
        """Read a PEFT adapter, or take one from memory, and give it a name.

        A name that exists gets new content; running requests keep the old.

        `weights` on one device, or sharded over several, are packed there by a program that is compiled once for each set of
        shapes. The packed block, in the pool's format, is copied to host memory once; from there it is loaded into the pool as
        adapters of files are. Other weights are packed on the host. Nothing refers to `weights` after the call; until then,
        they must neither change nor be donated.

        Args:
            name: A new name, or one that gets new content.
            path: Directory or URL of the adapter.
            pinned: Whether the name keeps it in the pool. None keeps the name's pin; a new name has none.
            weights: The adapter in memory, in the place of `path`: a state dict of PEFT, or pairs (A `[r, d_in]`, B
                `[d_out, r]`), as a list with `{target: (A, B)}` for each layer, as `{(layer, target): (A, B)}`, or stacked as
                `{target: (A [layers, r, d_in], B [layers, d_out, r])}`. Arrays are NumPy's, JAX's or PyTorch's.
            peft_config: Settings of `weights`: a LoraConfig of PEFT, or a mapping with its fields, lora_alpha at least.

        Raises:
            ValueError: The adapter cannot be served; says why. Nothing has changed then.
        """
        adapter = self.packer.job(name, path, weights, peft_config)()
        self.name_lora(name, adapter, path, pinned)
        return adapter.info

    def name_lora(
        self,
        name: str,
        adapter: PackedAdapter,
        path: str | Path | None = None,
        pinned: bool | None = None,
        load_inplace: bool = True,
    ) -> bool:
        """Give an adapter that is packed a name. Quick, as nothing is copied. Returns and raises as `AdapterRegistry.add`."""
        info = adapter.info
        already = self.adapters.add(name, info, None if path is None else str(path), pinned, load_inplace)
        self._executor.add(info.content_hash, adapter.placement, adapter.block)
        return already

    def remove_lora(self, name: str) -> None:
        """Forget a name. Requests that came with it finish; then its memory is free. Raises KeyError."""
        self.adapters.remove(name)

    def pin_lora(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter in the pool once it is there, or stop to. Raises ValueError or KeyError."""
        self.adapters.pin(name, pinned)

    def list_loras(self) -> list[str]:
        """Names of all adapters, sorted."""
        return self.adapters.names()

    def must_read(self, lora: LoRARequest) -> bool:
        """Whether a request's adapter is to be read before it starts."""
        return lora.path is not None and (lora.load_inplace or self.adapters.path(lora.name) != str(lora.path))

    def mix_job(self, lora: LoRAMix) -> MixJob | None:
        """Make the job that packs a mix, for any thread; None where the mix is known. Raises KeyError for an unknown name."""
        mix = self.adapters.mix(lora)
        if self.adapters.use_mix(mix):
            return None
        members = [(self.store.fetch(member), self._executor.placement(member)) for member, _ in mix.members]
        return MixJob(mix, lora.name, members)

    def add_mix(self, job: MixJob, packed: PackedAdapter) -> None:
        """Keep a mix that is packed, unless a member was removed meanwhile. Quick, as nothing is copied."""
        if self.adapters.add_mix(job.mix, job.label, packed.info):
            self._executor.add(packed.info.content_hash, packed.placement, packed.block)

    def _content_of(self, lora: LoRARequest) -> str:
        """Content hash of a request's adapter, which is read or mixed first where it is not known."""
        for member, _ in lora.members:
            if self.must_read(member):
                self.add_lora(member.name, member.path)
        if not isinstance(lora, LoRAMix):
            return self.adapters.named(lora.name).content_hash
        if (job := self.mix_job(lora)) is not None:
            self.add_mix(job, self.packer.mix(job))
        return self.adapters.mix(lora).content_hash

    # -- requests -------------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        lora: LoRARequest | None = None,
        request_id: str | None = None,
        arrival_time: float | None = None,
        priority: int = 0,
        prompt_only: bool = False,
    ) -> Request:
        """Take a request in; `loop.step()` advances it.

        Args:
            prompt_token_ids: Token ids of the prompt.
            params: Sampling parameters.
            lora: Adapter; None is the base model.
            request_id: An id that no unfinished request has; None makes one.
            arrival_time: Seconds of the engine's clock; None is now.
            priority: Class of the request, a signed 64-bit integer. Lower ones start first.
            prompt_only: See `Request`; with max_tokens of 1.

        Raises:
            ValueError: The request can never run; says why.
            KeyError: No adapter of that name is registered.
            QueueFull: max_queue_len requests wait already.
        """
        if len(prompt_token_ids) > self.max_model_len:  # before a look at each of them
            text = f"prompt has {len(prompt_token_ids)} tokens; allowed: {self.max_model_len} (max_model_len)"
            raise InvalidValue("prompt", text)
        self.vocabulary.check("prompt", prompt_token_ids)
        self.vocabulary.check_params(params)
        priority = check_priority(priority)
        stop_ids = self.vocabulary.stop_ids(params)  # a refused request takes no id and no seed from the next one
        guide = None if params.structured_outputs is None else self.grammars.guide(params.structured_outputs)
        allowed = self.vocabulary.mask(params.allowed_token_ids)
        adapter = None if lora is None else self._content_of(lora)
        if adapter is not None and params.prompt_logprobs is not None:
            self._check_scores(adapter)
        request = Request(
            request_id=request_id or f"request-{next(self._ids)}",
            prompt_token_ids=[int(t) for t in prompt_token_ids],
            params=params,
            arrival_time=self.clock() if arrival_time is None else arrival_time,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            stop_ids=stop_ids,
            adapter=adapter,
            priority=priority,
            adapter_name=lora.name if lora is not None else None,
            guide=guide,
            allowed=allowed,
            is_mix=isinstance(lora, LoRAMix),
            prompt_only=prompt_only,
            stream=None if self.tokenizer is None else self.tokenizer.stream(params.skip_special_tokens, prompt_token_ids),
        )
        self.loop.submit(request)
        return request

    def _check_scores(self, content_hash: str) -> None:
        if "lm_head" in self._executor.placement(content_hash).ranks:
            raise ValueError("prompt_logprobs is set; allowed: with the base model, and adapters that do not adapt lm_head")

    @property
    def grammars(self) -> Grammars:
        """Grammars for the model's tokenizer. Raises InvalidGrammar without one."""
        return self.vocabulary.grammars

    # -- parts ----------------------------------------------------------------------------------------------------------

    def _make_executor(self) -> JaxExecutor:
        return JaxExecutor(self.runner, self.store)

    def _close_predictor(self) -> None:
        if isinstance(self._predictor, ProxyPredictor):
            self._predictor.close()


def _make_parts(
    config: EngineConfig, generation_config: Path | None, predictor: LengthPredictor | None
) -> tuple[SamplingDefaults, LengthPredictor]:
    """Read the files that settings name. Raises ValueError; nothing has changed then.

    Args:
        config: The settings.
        generation_config: The model's own file of sampling defaults; None where it has none.
        predictor: Predictor to use in the place of the one of the settings.
    """
    return SamplingDefaults.of(config.generation_config, generation_config), predictor or make_predictor(config)
