"""Puts an engine together: checkpoint, device, pool, loop, adapters by name."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.checkpoints import huggingface, length_proxy, peft
from chameleon_jax.checkpoints.loading import load_checkpoint
from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.config import EngineConfig
from chameleon_jax.loop import ServingLoop
from chameleon_jax.memory.adapter_registry import AdapterNames
from chameleon_jax.memory.adapters import MAX_RANK, AdapterInfo
from chameleon_jax.memory.page_pool import PagePool
from chameleon_jax.models import llama, ops
from chameleon_jax.models.adapters.host_store import HostStore
from chameleon_jax.models.adapters.transfers import PinnedBlock
from chameleon_jax.models.adapters.weights import AdapterWeights
from chameleon_jax.models.config import PRESETS, TARGETS, LlamaConfig
from chameleon_jax.models.page_layout import AdapterPlacement, PageLayout
from chameleon_jax.models.runtime import steps
from chameleon_jax.models.runtime.executor import JaxExecutor
from chameleon_jax.models.runtime.jax_setup import enable_compilation_cache, take_device_memory
from chameleon_jax.models.runtime.model_runner import ModelRunner
from chameleon_jax.models.runtime.programs import Progress
from chameleon_jax.models.runtime.steps import StepBuckets
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import MAX_STOP_IDS, LoRARequest, SamplingParams
from chameleon_jax.scheduler.length_predictor import HistoryPredictor, LengthPredictor
from chameleon_jax.serving.proxy_predictor import ProxyPredictor
from chameleon_jax.serving.sampling_defaults import NO_DEFAULTS, SamplingDefaults, generation_file
from chameleon_jax.systems import get_system

DEFAULT_MAX_MODEL_LEN = 2048
CPU_POOL_BYTES = 2 << 30


@dataclasses.dataclass(frozen=True)
class PackedAdapter:
    """What an adapter is to the host, where its rows lie in its pages, and its packed block."""

    info: AdapterInfo
    placement: AdapterPlacement
    block: PinnedBlock


class Engine:
    """A model that serves, and the adapters it knows by name. One thread owns it.

    Args:
        model: a preset's name, a GGUF file, a Hugging Face or Orbax directory, or a hub id.
        progress: told how many programs are compiled.

    Raises:
        ValueError: the checkpoint or the configuration cannot be served; says why.
    """

    def __init__(
        self,
        model: str,
        config: EngineConfig,
        *,
        progress: Progress = lambda done, total: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        defaults_file = generation_file(config.generation_config)
        enable_compilation_cache()
        take_device_memory(config.gpu_memory_utilization)
        self.config = config
        self.model_name = model
        self.dtype = jnp.dtype(_dtype(config.dtype))
        self.tokenizer: Tokenizer | None = None
        if config.load_format == "dummy":
            self.model_config = _preset_or_config(model)
            weights = llama.random_model(self.model_config, self.dtype, config.seed)
            own_defaults = huggingface.generation_file(Path(model))
        else:
            checkpoint = load_checkpoint(model)
            self.model_config = checkpoint.config
            self.tokenizer = checkpoint.tokenizer
            weights = llama.load_tensors(checkpoint.config, checkpoint.tensors, self.dtype)
            own_defaults = checkpoint.generation_config
        if config.generation_config not in NO_DEFAULTS:
            defaults_file = defaults_file or own_defaults
        self.sampling_defaults = SamplingDefaults({}) if defaults_file is None else SamplingDefaults.read(defaults_file)
        self.layout = PageLayout.for_model(self.model_config, config.page_tokens)
        self.max_model_len = config.max_model_len or min(self.model_config.max_position_embeddings, DEFAULT_MAX_MODEL_LEN)
        if self.max_model_len > self.model_config.max_position_embeddings:
            raise ValueError(
                f"max_model_len is {self.max_model_len}; the model allows at most {self.model_config.max_position_embeddings}"
            )
        stats = jax.devices()[0].memory_stats()
        self.device = ModelRunner(
            weights,
            self.layout,
            self._buckets(),
            config.num_pages or (self._pages_on_host() if stats is None else None),
            self.dtype,
            progress,
            memory_limit=0 if stats is None else stats["bytes_limit"],
        )
        self.num_pages = self.device.num_pages
        self.store = HostStore(config.lora_host_bytes, stage=self.device.stage)
        self._predictor: LengthPredictor = HistoryPredictor(config.predicted_output_len)
        if config.length_proxy is not None:
            self._predictor = ProxyPredictor(length_proxy.load(config.length_proxy), self._predictor)
        self._placements: dict[str, AdapterPlacement] = {}
        self._executor = JaxExecutor(self.device, self.store, self._placements, get_system(config.system).transfers_per_load)
        self.loop = ServingLoop(
            config,
            self._executor,
            PagePool(self.num_pages),
            page_tokens=self.layout.page_tokens,
            max_model_len=self.max_model_len,
            shapes=self.device.buckets.prefill_shapes,
            clock=clock,
            predictor=self._predictor,
            forget=self._forget,
        )
        self.names = AdapterNames(self.loop)
        self.registry = self.names.registry
        self.clock = clock
        self._ids = itertools.count()
        self._seeds = random.Random(config.seed)

    def close(self) -> None:
        self.store.close()
        if isinstance(self._predictor, ProxyPredictor):
            self._predictor.close()

    # -- adapters -------------------------------------------------------------------------------------------------------

    def add_lora(self, name: str, path: str | Path, pinned: bool | None = None) -> AdapterInfo:
        """Reads a PEFT adapter and names it; a name that exists is given the new content, running requests keep the old.

        Args:
            pinned: whether the name keeps it in the pool; None: as before, and a new name does not.

        Raises:
            ValueError: the adapter cannot be served; says why. Nothing has changed then.
        """
        adapter = self.read_lora(name, path)
        self.name_lora(name, adapter, path, pinned)
        return adapter.info

    def read_lora(self, name: str, path: str | Path) -> PackedAdapter:
        """Reads a PEFT adapter and packs it. Thread-safe, and changes nothing: any thread may, while requests run.

        Raises:
            ValueError: the adapter cannot be served; says why.
        """
        self._check_name(name)
        return self.pack_lora(name, peft.load(path, self.model_config))

    def pack_lora(self, name: str, weights: AdapterWeights) -> PackedAdapter:
        """`read_lora` of weights that are in memory."""
        self._check_name(name)
        weights.check(self.model_config)
        rank = max(weights.ranks.values())
        if rank > self.config.max_lora_rank:
            allowed = f"1 to {self.config.max_lora_rank} (max_lora_rank; the server's --max-lora-rank, at most {MAX_RANK})"
            raise ValueError(f"adapter {name!r}: rank is {rank}; allowed: {allowed}")
        placement = self.layout.place(weights.ranks)
        if placement.num_pages >= self.num_pages - 1:
            raise ValueError(f"adapter {name!r} takes {placement.num_pages} pages; the pool has {self.num_pages - 1}")
        block = self.layout.pack(weights, self.dtype)
        if not np.isfinite(block.astype(np.float32)).all():
            raise ValueError(f"adapter {name!r}: weights overflow {self.dtype.name}")
        num_bytes = placement.num_pages * self.layout.page_bytes(self.dtype.itemsize)
        info = AdapterInfo(weights.content_hash, rank, placement.num_pages, num_bytes)
        return PackedAdapter(info, placement, self.device.stage(block))

    def name_lora(
        self,
        name: str,
        adapter: PackedAdapter,
        path: str | Path | None = None,
        pinned: bool | None = None,
        load_inplace: bool = True,
    ) -> bool:
        """Gives an adapter that was packed a name; quick, as nothing is copied. See `AdapterNames.set`."""
        content_hash = adapter.info.content_hash
        already = self.names.set(name, adapter.info, None if path is None else str(path), pinned, load_inplace)
        self.store.put(content_hash, adapter.block)
        self._placements[content_hash] = adapter.placement
        return already

    def _check_name(self, name: str) -> None:
        if not self.config.enable_lora:
            raise ValueError(f"adapter {name!r}: enable_lora is False")
        if not name:
            raise ValueError("the adapter's name is empty")

    def remove_lora(self, name: str) -> None:
        """Unnames an adapter. Requests that use it finish; then its memory is free. Raises KeyError."""
        self.names.remove(name)

    def pin_lora(self, name: str, pinned: bool = True) -> None:
        """Keeps an adapter in the pool once it is there. Raises ValueError or KeyError."""
        self.names.pin(name, pinned)

    def list_loras(self) -> list[str]:
        return self.registry.names()

    def must_read(self, lora: LoRARequest) -> bool:
        """Whether it names a path that is to be read."""
        return lora.path is not None and (lora.load_inplace or self.registry.path(lora.name) != str(lora.path))

    def _forget(self, content_hash: str) -> None:
        self.store.remove(content_hash)
        self._placements.pop(content_hash, None)
        self._executor.forget(content_hash)
        self._predictor.forget(content_hash)

    # -- requests -------------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        lora: LoRARequest | None = None,
        request_id: str | None = None,
        arrival_time: float | None = None,
    ) -> Request:
        """Takes a request in; `loop.step()` advances it.

        Raises:
            ValueError: the request can never run; says why. KeyError: no adapter of that name. QueueFull.
        """
        if len(prompt_token_ids) > self.max_model_len:  # before a look at each of them
            raise ValueError(f"prompt has {len(prompt_token_ids)} tokens; allowed: {self.max_model_len} (max_model_len)")
        vocab = self.model_config.vocab_size
        for t in (*prompt_token_ids, *params.stop_token_ids):
            if not isinstance(t, int | np.integer) or not 0 <= t < vocab:
                raise ValueError(f"token id {t!r} is out of range; allowed: 0 to {vocab - 1}")
        adapter = None
        if lora is not None:
            if self.must_read(lora):
                self.add_lora(lora.name, str(lora.path))
            adapter = self.names.named(lora.name).content_hash
        eos = () if params.ignore_eos else self.model_config.eos_token_ids
        if self.tokenizer is not None and not params.ignore_eos:
            eos = (*eos, *self.tokenizer.eos_token_ids)
        stop_ids = frozenset((*eos, *params.stop_token_ids))
        if len(stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"stop_token_ids and the model's own are {len(stop_ids)} ids; allowed: {MAX_STOP_IDS} together")
        request = Request(
            request_id=request_id or f"request-{next(self._ids)}",
            prompt_token_ids=[int(t) for t in prompt_token_ids],
            params=params,
            arrival_time=self.clock() if arrival_time is None else arrival_time,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            stop_ids=stop_ids,
            adapter=adapter,
            adapter_name=lora.name if lora is not None else None,
            stream=None if self.tokenizer is None else self.tokenizer.stream(params.skip_special_tokens, prompt_token_ids),
        )
        self.loop.submit(request)
        return request

    # -- sizes ----------------------------------------------------------------------------------------------------------

    def _buckets(self) -> StepBuckets:
        config = self.config
        widest = self.layout.place({t: config.max_lora_rank for t in TARGETS}).num_pages
        return StepBuckets(
            max_num_seqs=config.max_num_seqs,
            max_prefill_tokens=config.max_num_batched_tokens,
            table_width=self.layout.pages_for_tokens(self.max_model_len),
            max_rank=config.max_lora_rank,
            max_adapter_pages=widest if config.enable_lora else 0,
            **steps.shapes_for(ops.default_backend()),
        )

    def _pages_on_host(self) -> int:
        """The pool of a device that is the host: modest, as nobody said how much memory there is."""
        sequences = self.config.max_num_seqs * self.layout.pages_for_tokens(self.max_model_len)
        adapters = max(sequences // 2, self._buckets().max_adapter_pages)
        page_bytes = self.layout.page_bytes(self.dtype.itemsize)
        if 2 * page_bytes > CPU_POOL_BYTES:
            raise ValueError(f"no room for a page pool: {CPU_POOL_BYTES} bytes are left and a page takes {page_bytes}")
        return min(CPU_POOL_BYTES // page_bytes, 1 + sequences + adapters)


def _dtype(name: str) -> str:
    return name if name != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _preset_or_config(model: str) -> LlamaConfig:
    """For dummy weights: a preset's name, or a directory with a config.json."""
    if model in PRESETS:
        return PRESETS[model]
    if not (Path(model) / "config.json").is_file():
        raise ValueError(
            f"model is {model!r}; with load_format='dummy' allowed: {', '.join(PRESETS)}, or a directory with config.json"
        )
    return huggingface.read_config(Path(model))
