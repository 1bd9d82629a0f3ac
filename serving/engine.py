"""The engine: a checkpoint, compiled programs, and the loop that serves with them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.checkpoints import length_proxy
from chameleon_jax.checks import require
from chameleon_jax.config import EngineConfig
from chameleon_jax.errors import InvalidGrammar
from chameleon_jax.loop import ServingLoop
from chameleon_jax.memory.adapter_registry import AdapterRegistry
from chameleon_jax.memory.adapters import AdapterInfo
from chameleon_jax.models import ops
from chameleon_jax.models.adapters.host_store import HostStore
from chameleon_jax.models.config import TARGETS
from chameleon_jax.models.page_layout import PageLayout
from chameleon_jax.models.runtime import steps
from chameleon_jax.models.runtime.executor import JaxExecutor
from chameleon_jax.models.runtime.jax_setup import enable_compilation_cache, take_device_memory
from chameleon_jax.models.runtime.model_runner import HOST_POOL_BYTES, ModelRunner
from chameleon_jax.models.runtime.programs import Progress
from chameleon_jax.models.runtime.steps import StepBuckets
from chameleon_jax.models.sampling import mask_of
from chameleon_jax.request import Request, check_priority
from chameleon_jax.sampling_params import MAX_STOP_IDS, LoRAMix, LoRARequest, SamplingParams
from chameleon_jax.scheduler.length_predictor import HistoryPredictor, LengthPredictor
from chameleon_jax.scheduler.stats import ProxyCounters
from chameleon_jax.serving.adapters import AdapterPacker, MixJob, PackedAdapter
from chameleon_jax.serving.loaded_model import load_model
from chameleon_jax.serving.max_model_len import LengthLimits
from chameleon_jax.serving.proxy_predictor import ProxyPredictor
from chameleon_jax.serving.sampling_defaults import NO_DEFAULTS, SamplingDefaults, generation_file
from chameleon_jax.systems import get_system

if TYPE_CHECKING:
    from chameleon_jax.structured_outputs import Grammars

logger = logging.getLogger(__name__)


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
        self.model_name = model
        self.dtype = jnp.dtype(_dtype(config.dtype))
        loaded = load_model(model, config, self.dtype)
        self.model_config, self.tokenizer = loaded.config, loaded.tokenizer
        self._generation_config = loaded.generation_config
        self.layout = PageLayout.for_model(self.model_config, config.page_tokens)
        parts = self._make_parts(config, None)
        stats = jax.devices()[0].memory_stats()
        # the pool's size depends on scratch, scratch on block tables, and these on the longest sequence: it is chosen for
        # a pool that has no scratch beside it, and lowered once the pool is known
        limits = LengthLimits(
            config.max_model_len,
            self.model_config.max_position_embeddings,
            self.layout.page_tokens,
            self._adapter_pages(config),
            on_host=jax.default_backend() == "cpu",
        )
        most = limits.choose(config.num_pages or self._most_pages(stats))
        self.runner = ModelRunner(
            loaded.weights,
            self.layout,
            self._buckets(config, most.tokens),
            config.num_pages,
            self.dtype,
            progress,
            memory_limit=None if stats is None else stats["bytes_limit"],
            ahead=config.compile_ahead,
        )
        chosen = min(most, limits.choose(self.runner.num_pages))
        logger.info("max_model_len is %d: %s", *chosen)
        self._log_pool()
        self.built = dataclasses.replace(config, max_model_len=chosen.tokens, num_pages=self.runner.num_pages)
        self.store = HostStore(config.lora_host_bytes, stage=self.runner.stage)
        self._executor = self._make_executor()
        self._ids = itertools.count()
        self._start(self.built, clock, *parts)

    def _make_parts(self, config: EngineConfig, predictor: LengthPredictor | None) -> tuple[SamplingDefaults, LengthPredictor]:
        """Read the files that settings name. Raises ValueError; nothing has changed then."""
        return self._read_sampling_defaults(config), predictor or _make_predictor(config)

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
        self.packer = AdapterPacker(config, self.layout, self.dtype, self.num_pages, self.runner.stage)
        self._predictor = predictor
        self._seeds = random.Random(config.seed)
        self.loop = ServingLoop(
            config,
            self._executor,
            self.num_pages,
            page_tokens=self.layout.page_tokens,
            max_model_len=self.max_model_len,
            shapes=self.runner.buckets.prefill_shapes,
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
        self._check_restart(config)
        parts = self._make_parts(config, predictor)
        for request in self.loop.unfinished:
            self.loop.abort(request.request_id)
        self.loop.recover()
        adapters = self.adapters
        self._close_predictor()
        self._start(config, clock or self.clock, *parts)
        adapters.copy_to(self.adapters)

    def _check_restart(self, config: EngineConfig) -> None:
        config.check_restart(self.built)
        generation_file(config.generation_config)
        assert config.num_pages is not None
        for name in self.list_loras():
            info = self.adapters.named(name)
            require(config.enable_lora, "enable_lora", False, f"True, as adapter {name!r} is registered")
            allowed = f"at least {info.rank}, the rank of adapter {name!r}"
            require(info.rank <= config.max_lora_rank, "max_lora_rank", config.max_lora_rank, allowed)
            allowed = f"more than {info.num_pages + 1}, as adapter {name!r} takes {info.num_pages}"
            require(info.num_pages < config.num_pages - 1, "num_pages", config.num_pages, allowed)
        pinned = self.loop.cache.pinned_pages()
        if pinned > (config.num_pages - 1) // 2:
            raise ValueError(
                f"num_pages is {config.num_pages}; allowed: more than {2 * pinned}, as pinned adapters take {pinned}"
            )

    def close(self) -> None:
        """End background threads and remove temporary files."""
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
        """Keep a mix that is packed, for requests that ask for it. Quick, as nothing is copied."""
        self.adapters.add_mix(job.mix, job.label, packed.info)
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
    ) -> Request:
        """Take a request in; `loop.step()` advances it.

        Args:
            prompt_token_ids: Token ids of the prompt.
            params: Sampling parameters.
            lora: Adapter; None is the base model.
            request_id: An id that no unfinished request has; None makes one.
            arrival_time: Seconds of the engine's clock; None is now.
            priority: Class of the request, a signed 64-bit integer. Lower ones start first.

        Raises:
            ValueError: The request can never run; says why.
            KeyError: No adapter of that name is registered.
            QueueFull: max_queue_len requests wait already.
        """
        self._check_tokens(prompt_token_ids, params)
        priority = check_priority(priority)
        stop_ids = self._stop_ids(params)  # a refused request takes no id and no seed from the next one
        guide = None if params.structured_outputs is None else self.grammars.guide(params.structured_outputs)
        adapter, allowed = None if lora is None else self._content_of(lora), params.allowed_token_ids
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
            allowed=None if allowed is None else mask_of(allowed, self.model_config.vocab_size),
            is_mix=isinstance(lora, LoRAMix),
            stream=None if self.tokenizer is None else self.tokenizer.stream(params.skip_special_tokens, prompt_token_ids),
        )
        self.loop.submit(request)
        return request

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Grammars for the model's tokenizer; made at the first use, in half a second. Raises InvalidGrammar without one."""
        from chameleon_jax.structured_outputs import (
            Grammars,
            Vocabulary,
        )  # here, since other requests are served without the package

        if self.tokenizer is None:
            raise InvalidGrammar("the model has no tokenizer (load_format='dummy')")
        ids, tokens = range(self.model_config.vocab_size), self.tokenizer.token_bytes
        encode = functools.partial(self.tokenizer.encode, add_special_tokens=False)
        special = [i for i in ids if i in tokens.special_ids]
        vocabulary = Vocabulary([tokens.inside(i) for i in ids], special, encode)
        return Grammars(vocabulary, sorted(self._stop_ids(SamplingParams())))

    def _check_tokens(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        if len(prompt_token_ids) > self.max_model_len:  # before a look at each of them
            raise ValueError(f"prompt has {len(prompt_token_ids)} tokens; allowed: {self.max_model_len} (max_model_len)")
        fields = {name: getattr(params, name) or () for name in ("stop_token_ids", "logit_bias", "allowed_token_ids")}
        vocab = self.model_config.vocab_size
        for field, token_ids in {"prompt": prompt_token_ids, **fields}.items():
            for t in token_ids:
                if not isinstance(t, int | np.integer) or not 0 <= t < vocab:
                    raise ValueError(f"{field}: token id {t!r} is out of range; allowed: 0 to {vocab - 1}")

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """Ids that end a request: its own, and the model's unless it ignores them."""
        eos = () if params.ignore_eos else self.model_config.eos_token_ids
        if self.tokenizer is not None and not params.ignore_eos:
            eos = (*eos, *self.tokenizer.eos_token_ids)
        stop_ids = frozenset((*eos, *params.stop_token_ids))
        if len(stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"stop_token_ids and the model's own are {len(stop_ids)} ids; allowed: {MAX_STOP_IDS} together")
        return stop_ids

    # -- parts ----------------------------------------------------------------------------------------------------------

    def _make_executor(self) -> JaxExecutor:
        return JaxExecutor(self.runner, self.store)

    def _close_predictor(self) -> None:
        if isinstance(self._predictor, ProxyPredictor):
            self._predictor.close()

    def _read_sampling_defaults(self, config: EngineConfig) -> SamplingDefaults:
        file = generation_file(config.generation_config)
        if file is None and config.generation_config not in NO_DEFAULTS:
            file = self._generation_config
        return SamplingDefaults({}) if file is None else SamplingDefaults.read(file)

    def _log_pool(self) -> None:
        pages, page_bytes = self.runner.num_pages, self.layout.page_bytes(self.dtype.itemsize)
        text = "the pool has %d pages: %d tokens of KV without adapters, %d MiB"
        logger.info(text, pages, (pages - 1) * self.layout.page_tokens, pages * page_bytes >> 20)

    def _most_pages(self, stats: Mapping[str, int] | None) -> int:
        """Pages that the device's memory would hold beside the weights, were there no scratch. Args: stats: of its memory."""
        free = HOST_POOL_BYTES if stats is None else stats["bytes_limit"] - stats["bytes_in_use"]
        return free // self.layout.page_bytes(self.dtype.itemsize)

    def _adapter_pages(self, config: EngineConfig) -> int:
        """Pages of the largest adapter that is served."""
        return self.layout.place({t: config.max_lora_rank for t in TARGETS}).num_pages if config.enable_lora else 0

    def _buckets(self, config: EngineConfig, max_model_len: int) -> StepBuckets:
        return StepBuckets(
            max_num_seqs=config.max_num_seqs,
            max_prefill_tokens=config.max_num_batched_tokens,
            table_width=self.layout.pages_for_tokens(max_model_len),
            max_rank=config.max_lora_rank,
            max_adapter_pages=self._adapter_pages(config),
            **steps.shapes_for(ops.default_backend()),
        )


def compile_progress(done: int, total: int) -> None:
    """Print one line that counts compiled programs."""
    print(f"\rcompiling programs: {done}/{total}", end="" if done < total else "\n", flush=True)


def open_engine(
    model: str | LLMEngine, settings: Mapping[str, Any], progress: Callable[[int, int], None]
) -> tuple[LLMEngine, bool]:
    """Build an engine where `model` names one, else return it. The second value says whether it was built.

    Raises:
        ValueError: The model cannot be served, a setting is wrong, or settings are given beside an engine.
    """
    if isinstance(model, LLMEngine):
        if settings:
            raise ValueError(f"{', '.join(settings)}: allowed with a model's name; an engine that is built has its settings")
        return model, False
    return LLMEngine(str(model), EngineConfig.of(settings), progress=progress), True


def _make_predictor(config: EngineConfig) -> LengthPredictor:
    history = HistoryPredictor(config.predicted_output_len)
    return history if config.length_proxy is None else ProxyPredictor(length_proxy.load(config.length_proxy), history)


def _dtype(name: str) -> str:
    return name if name != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
