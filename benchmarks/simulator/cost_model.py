"""Costs of steps and transfers on hardware that is not here, as roofline terms with measured or published efficiencies."""

from __future__ import annotations

import dataclasses

from chameleon_jax.models.config import PRESETS, LlamaConfig
from chameleon_jax.models.page_layout import PageLayout
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler import PrefillChunk, StepPlan

GIB = 2**30
LENGTH_FACTOR = 0.185
"""Scale of Azure's lengths on the A40; the paper scaled them too, by a factor that it does not give."""
STEP_TOKENS = 512
"""Prompt tokens of a step on the A40."""
MEDIUM_INPUT = round(1020 * LENGTH_FACTOR)
"""Prompt tokens of the paper's medium request, the trace's scaled median."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """One model on one device, or on `tensor_parallel` devices.

    Times are in seconds, rates a second, sizes in bytes.

    Attributes:
        memory: Memory of all devices; `utilization` of it holds weights, scratch and pool.
        bandwidth: Bytes that kernels read from device memory.
        flops: Operations of large matrix products.
        prefill_overhead: Fixed time of a step with prompts: launches, embedding, sampling.
        lora_overhead: Fixed time of prompts that have any adapter; decodes that have any take half of it.
        lora_token_rank: LoRA compute of one prompt token and one rank, q k v o.
        lora_row: LoRA compute of one decoding row, beside reading its adapter.
        decode_overhead: Fixed time of a step that decodes. A step that also has prompts takes the larger of both overheads:
            they are launches, which one pass has once.
        host: Host time for a step, before the device gets it.
        link_bandwidth: Bytes of host-to-device transfers, which queue for the link.
        link_latency: Time to launch an adapter's copy to the device.
        scratch: Memory beside weights and pool, of each device.
        utilization: Share of the memory that is used.
        itemsize: Bytes of a weight, and of an element of the pool.
        tp_overhead: Time of the collectives of one pass, for each doubling of `tensor_parallel`.
        passes: Passes of a step with prompts and decodes. 1, as our engine runs it: both together. 2, as the paper's systems on
            S-LoRA: one after the other, each with its own launches and collectives, and each reading the weights.
        num_pages_override: Pages of the pool. None computes them.
    """

    name: str
    model: LlamaConfig
    memory: float
    bandwidth: float
    flops: float
    prefill_overhead: float
    lora_overhead: float
    lora_token_rank: float
    lora_row: float
    decode_overhead: float
    host: float
    link_bandwidth: float
    link_latency: float
    scratch: float = 3 * GIB
    utilization: float = 0.9
    itemsize: int = 2
    page_tokens: int = 16
    tensor_parallel: int = 1
    tp_overhead: float = 0.0
    passes: int = 1
    num_pages_override: int | None = None

    @property
    def layout(self) -> PageLayout:
        return PageLayout.for_model(self.model, self.page_tokens)

    @property
    def weight_bytes(self) -> float:
        return self.model.num_params * self.itemsize

    @property
    def page_bytes(self) -> int:
        return self.layout.page_bytes(self.itemsize)

    @property
    def num_pages(self) -> int:
        if self.num_pages_override is not None:
            return self.num_pages_override
        room = self.memory * self.utilization - self.weight_bytes - self.scratch * self.tensor_parallel
        if room < 2 * self.page_bytes:
            raise ValueError(
                f"{self.name}: {self.model.num_params / 1e9:.0f} B parameters leave no room in {self.memory / GIB:.0f} GiB"
            )
        return int(room // self.page_bytes)

    def adapter_pages(self, rank: int, targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")) -> int:
        return self.layout.place(dict.fromkeys(targets, rank)).num_pages


class CostModel:
    """Seconds of step plans and transfers on a profile."""

    def __init__(self, profile: Profile, ranks: dict[str, int]):
        model, tp = profile.model, profile.tensor_parallel
        self.profile = profile
        self._ranks = ranks
        self._pages = {name: profile.adapter_pages(rank) for name, rank in ranks.items()}
        doublings = tp.bit_length() - 1
        self._collectives = profile.tp_overhead * doublings
        self._weights = profile.weight_bytes / profile.bandwidth / tp
        self._token = 2 * profile.model.num_params / profile.flops / tp
        self._attention = 4 * model.num_layers * model.num_heads * model.head_dim / profile.flops / tp  # a token and key
        self._kv_token = profile.page_bytes / profile.layout.page_tokens / profile.bandwidth / tp
        self._page = profile.page_bytes / profile.bandwidth / tp
        self._lora_token_rank = profile.lora_token_rank / tp

    def step(self, plan: StepPlan) -> float:
        """Seconds of a step. Weights, launches and collectives belong to its passes, all other work to prompts or decodes."""
        kinds = []
        if plan.prefills:
            kinds.append((sum([chunk.num_tokens for chunk in plan.prefills]), self.profile.prefill_overhead))
        if plan.decodes:
            kinds.append((len(plan.decodes), self.profile.decode_overhead))
        if len(kinds) > 1 and self.profile.passes == 1:
            tokens, overheads = zip(*kinds)
            kinds = [(sum(tokens), max(overheads))]
        passes = sum([overhead + self._collectives + max(self._weights, self._token * tokens) for tokens, overhead in kinds])
        return passes + self._prompts(plan.prefills) + self._rows(plan.decodes)

    def _prompts(self, prefills: list[PrefillChunk]) -> float:
        """Seconds of the prompts' attention and adapters."""
        seconds, lora = 0.0, 0
        for chunk in prefills:
            n = chunk.num_tokens
            seconds += self._attention * n * (chunk.start + n / 2)
            if chunk.request.adapter is not None:
                lora += n * self._ranks[chunk.request.adapter]
        if lora:
            seconds += self.profile.lora_overhead + self._lora_token_rank * lora
        return seconds

    def _rows(self, rows: list[Request]) -> float:
        """Seconds of the decode rows' KV and adapters."""
        profile = self.profile
        seconds = self._kv_token * sum([request.num_computed for request in rows])
        adapters = {request.adapter for request in rows}
        adapters.discard(None)
        if adapters:
            pages = sum([self._pages[name] for name in adapters])  # type: ignore[index,misc]
            seconds += profile.lora_overhead / 2 + self._page * pages + profile.lora_row * len(rows)
        return seconds

    def load(self, num_bytes: int, copies: int = 1) -> tuple[float, float]:
        """Seconds to launch an adapter's copies, and for which they hold the link."""
        return copies * self.profile.link_latency, copies * num_bytes / self.profile.link_bandwidth


_A40 = Profile(
    name="a40-llama-7b",
    model=PRESETS["llama-7b"],
    memory=48e9,
    bandwidth=560e9,
    flops=88.4e12,
    prefill_overhead=0.030,
    lora_overhead=0.007,
    lora_token_rank=0.42e-3 / MEDIUM_INPUT,
    lora_row=5e-5,
    decode_overhead=0.012,
    host=0.001,
    link_bandwidth=12.9e9,
    link_latency=0.0045,
    passes=2,
)
"""Profile calibrated, with LENGTH_FACTOR and STEP_TOKENS, to the paper's figures of its A40.

The figures are the time to first token of a medium request on an idle machine by rank, and S-LoRA's knee (see docs/paper.md).
560 GB/s is 80 % of the A40's bandwidth, 88 TFLOP/s 59 % of its bf16 rate."""

_A10G_S_LORA = Profile(
    name="a10g-s-lora",
    model=PRESETS["llama-7b"],
    memory=24e9,
    bandwidth=520e9,
    flops=55e12,
    prefill_overhead=0.030,
    lora_overhead=0.006,
    lora_token_rank=2.3e-6,
    lora_row=5e-5,
    decode_overhead=0.004,
    host=0.001,
    link_bandwidth=25.8e9,
    link_latency=0.00225,
    page_tokens=2,  # the least; S-LoRA's is 1
    num_pages_override=1 + 14_500 // 2,
    passes=2,
)
"""S-LoRA's kernels and loop on an A10G, held to ten points that its authors measured (see `s_lora.py`).

520 GB/s is 87 % of the A10G's bandwidth."""

S_LORA_LENGTH_FACTOR = 0.25
"""Scale of Azure's lengths with which S-LoRA's loop has the paper's knee, 8.6 requests a second, at S_LORA_BATCH_TOKENS."""
S_LORA_LENGTH_FACTORS = (0.185, 0.21, S_LORA_LENGTH_FACTOR, 0.3)
S_LORA_BATCH_TOKENS = 3072
"""Prompt tokens of a batch in S-LoRA's loop; the least that its code takes by itself (`batch_max_tokens`)."""


def _a40_s_lora(length_factor: float) -> Profile:
    """S-LoRA's kernels on the paper's A40.

    The bandwidth and the overhead of a decode are the A10G's, which was measured; the rest follows from the paper's figure 2,
    whose medium request has the trace's median length. A first token on an idle machine takes 58 ms without an adapter, of
    which 28 are products, and 6.8 ms and 0.42 ms a rank more with one; a load is two copies of 2.25 ms and the adapter's bytes
    at 25.8 GB/s.
    """
    medium = 1020 * length_factor
    return dataclasses.replace(
        _A10G_S_LORA,
        name="a40-s-lora" + (f"-{length_factor:g}" if length_factor != S_LORA_LENGTH_FACTOR else ""),
        memory=48e9,
        bandwidth=696e9 * _A10G_S_LORA.bandwidth / 600e9,
        flops=2 * PRESETS["llama-7b"].num_params * medium / 0.028,
        lora_overhead=0.0068,
        lora_token_rank=0.4208e-3 / medium,
        page_tokens=16,
        num_pages_override=None,
    )


_A40_OURS = dataclasses.replace(
    _a40_s_lora(S_LORA_LENGTH_FACTOR),
    name="a40-ours",
    passes=1,
    flops=0.74 * 149.7e12,
    prefill_overhead=0.002,
    decode_overhead=0.001,
    lora_overhead=0.0026,
    lora_token_rank=1.1e-7 * 989 / 149.7,
    lora_row=1e-6,
    host=0.002,
)
"""Our engine on the paper's A40, predicted from an H200's measurements (docs/performance.md). No A40 has run it.

Prompts take 74 % of the published rate without adapters, 1.1e-7 s more a token and rank on the H200 (rank 16 on q k v o), here
in proportion to the rate. A decode takes 0.9 ms beside reading its bytes, 1.3 ms more with adapters. The bandwidth is S-LoRA's.
"""

_SPEEDUP = 1.9  # A100 kernels that neither memory nor tensor cores bound: launches, LoRA
_A100 = dataclasses.replace(
    _A40,
    name="a100-80gb",
    memory=80e9,
    bandwidth=1630e9,
    flops=184e12,
    prefill_overhead=_A40.prefill_overhead / _SPEEDUP,
    lora_overhead=_A40.lora_overhead / _SPEEDUP,
    lora_token_rank=_A40.lora_token_rank / _SPEEDUP,
    lora_row=_A40.lora_row / _SPEEDUP,
    decode_overhead=_A40.decode_overhead / _SPEEDUP,
)
_LLAMA_70B = dataclasses.replace(
    PRESETS["llama-30b"], hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128
)


def _a100(name: str, model: LlamaConfig = _A100.model, gigabytes: float = 80, tp: int = 1) -> Profile:
    """Profile of A100s. LoRA work and launches grow with layers and width as the model's own do.

    Under tensor parallelism each device loads its shard, but all of them over one host's memory: the time of a load does not
    shrink.
    """
    scale = model.num_layers * model.hidden_size / (_A100.model.num_layers * _A100.model.hidden_size)
    layers = model.num_layers / _A100.model.num_layers
    return dataclasses.replace(
        _A100,
        name=name,
        model=model,
        memory=gigabytes * 1e9 * tp,
        tensor_parallel=tp,
        tp_overhead=2 * model.num_layers * 25e-6,
        prefill_overhead=_A100.prefill_overhead * layers,
        decode_overhead=_A100.decode_overhead * layers,
        lora_token_rank=_A100.lora_token_rank * scale,
    )


_ALL = [
    _A40,
    dataclasses.replace(_A40, name="a40-llama-7b-small-pool", scratch=12.9e9),  # 2,005 pages: adapters are evicted
    dataclasses.replace(_A40, name="a40-llama-7b-one-pass", passes=1),
    _A10G_S_LORA,
    *map(_a40_s_lora, S_LORA_LENGTH_FACTORS),
    dataclasses.replace(_a40_s_lora(S_LORA_LENGTH_FACTOR), name="a40-s-lora-one-pass", passes=1),
    dataclasses.replace(
        _a40_s_lora(S_LORA_LENGTH_FACTOR),
        name="a40-s-lora-our-adapters",
        passes=1,
        lora_overhead=_A40_OURS.lora_overhead,
        lora_token_rank=_A40_OURS.lora_token_rank,
        lora_row=_A40_OURS.lora_row,
    ),
    _A40_OURS,
    *(_a100(f"a100-{gb}gb", gigabytes=gb) for gb in (24, 48, 80)),
    *(_a100(f"a100-tp{tp}", tp=tp) for tp in (1, 2, 4)),
    _a100("a100-llama-13b", PRESETS["llama-13b"]),
    _a100("a100-llama-30b", PRESETS["llama-30b"]),
    _a100("a100-tp4-llama-70b", _LLAMA_70B, tp=4),
    dataclasses.replace(
        _A100,
        name="h100-llama-7b",
        bandwidth=2850e9,
        flops=590e12,
        prefill_overhead=0.002,
        decode_overhead=0.001,
        lora_overhead=0.001,
        lora_token_rank=_A40.lora_token_rank / 20,
        lora_row=1e-6,
        host=0.002,
        link_bandwidth=45e9,
        link_latency=0.0003,
        passes=1,
    ),
]
PROFILES: dict[str, Profile] = {profile.name: profile for profile in _ALL}
"""Profiles by name. The A100's and H100's are not calibrated: they have the A40's efficiencies on published rates, and for the
H100 the efficiencies that we aim at."""

STALL_S = 0.305
"""99th percentile of the time between tokens that systems with STEP_TOKENS a step have on the A40 at medium load."""


def stall_seconds(profile: Profile) -> float:
    """STALL_S in proportion to a full step on another profile, with prompts and 64 decoding rows of mean rank."""

    def full_step(profile: Profile) -> float:
        ranks = {f"a{i}": (8, 16, 32, 64, 128)[i % 5] for i in range(30)}
        requests = [Request(f"{i}", range(256), SamplingParams(), 0.0, 0, adapter=f"a{i % 30}") for i in range(64)]
        for request in requests:
            request.num_computed = 256
        chunks = [PrefillChunk(request, 0, STEP_TOKENS // 5, True) for request in requests[:5]]
        return CostModel(profile, ranks).step(StepPlan(prefills=chunks, decodes=requests))

    return STALL_S * full_step(profile) / full_step(_A40)
