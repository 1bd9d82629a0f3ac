"""How an engine is set up: one frozen value, checked once, here."""

from __future__ import annotations

import dataclasses
import math

from chameleon_jax.checks import require
from chameleon_jax.memory.adapters import MAX_RANK
from chameleon_jax.systems import System, get_system


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine.

    Attributes:
        dtype: of weights and pool; "auto" is float32 on CPU and bfloat16 elsewhere.
        load_format: "auto" reads the checkpoint, "dummy" draws random weights on the device.
        generation_config: where sampling parameters come from that a request leaves out: "auto" is the model's
            generation_config.json, "none" (or vLLM's word "vllm") is no file, else a directory with a file of that name.
        max_model_len: longest sequence, prompt and output, in tokens; None: what the model allows, at most 2048.
        max_num_seqs: requests that run at once.
        max_num_batched_tokens: prompt tokens of one prefill step; longer prompts are cut into chunks.
        max_lora_rank: largest rank that is served, 1 to 512.
        lora_host_bytes: bytes that packed adapters may take in host memory; the rest waits on disk.
        num_pages: pages of the device pool; None: what gpu_memory_utilization leaves, or on CPU enough for every running
            request at full length and for adapters half as much again, or the largest one; 2 GiB at most.
        gpu_memory_utilization: share of the device's memory that weights, pool and scratch may take.
        page_tokens: tokens of a page at least.
        enable_lora: False compiles no LoRA program and refuses adapters.
        system: which policies serve, one of `systems.SYSTEMS` by name, or a `systems.System` of your own.
        ttft_slo: seconds to the first token that the scheduler aims at.
        tbt_slo: seconds between tokens that the scheduler aims at.
        predicted_output_len: output tokens that a request is expected to take before any has ended; it may outgrow them.
        length_proxy: directory of a trained length proxy (`chameleon-jax train-length-proxy`) that predicts output lengths from
            prompts; None: from each adapter's history.
        max_queue_len: requests that may wait; None: no limit.
        seed: from which requests without a seed draw theirs.
    """

    dtype: str = "auto"
    load_format: str = "auto"
    generation_config: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_lora_rank: int = 256
    lora_host_bytes: int = 4 << 30
    num_pages: int | None = None
    gpu_memory_utilization: float = 0.9
    page_tokens: int = 16
    enable_lora: bool = True
    system: str | System = "chameleon-plus"
    ttft_slo: float = 5.0
    tbt_slo: float = 0.15
    predicted_output_len: int = 128
    length_proxy: str | None = None
    max_queue_len: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        dtypes = ("auto", "float32", "bfloat16")
        require(self.dtype in dtypes, "dtype", self.dtype, ", ".join(dtypes))
        require(self.load_format in ("auto", "dummy"), "load_format", self.load_format, "auto, dummy")
        require(self.max_model_len is None or self.max_model_len >= 1, "max_model_len", self.max_model_len, "1 or more")
        require(1 <= self.max_num_seqs <= 1024, "max_num_seqs", self.max_num_seqs, "1 to 1024")
        tokens = self.max_num_batched_tokens
        require(tokens >= 32 and tokens % 32 == 0, "max_num_batched_tokens", tokens, "a multiple of 32")
        require(1 <= self.max_lora_rank <= MAX_RANK, "max_lora_rank", self.max_lora_rank, f"1 to {MAX_RANK}")
        require(self.lora_host_bytes >= 0, "lora_host_bytes", self.lora_host_bytes, "0 or more")
        require(self.num_pages is None or self.num_pages >= 2, "num_pages", self.num_pages, "2 or more")
        share = self.gpu_memory_utilization
        require(0 < share <= 1, "gpu_memory_utilization", share, "above 0, at most 1")
        require(self.page_tokens >= 1, "page_tokens", self.page_tokens, "1 or more")
        get_system(self.system)
        require(0 < self.ttft_slo < math.inf, "ttft_slo", self.ttft_slo, "above 0 seconds, finite")
        require(0 < self.tbt_slo < math.inf, "tbt_slo", self.tbt_slo, "above 0 seconds, finite")
        require(self.predicted_output_len >= 1, "predicted_output_len", self.predicted_output_len, "1 or more")
        require(self.max_queue_len is None or self.max_queue_len >= 1, "max_queue_len", self.max_queue_len, "1 or more")
