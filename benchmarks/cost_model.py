"""What steps and transfers cost on hardware that is not here: roofline terms with measured or published efficiencies."""

from __future__ import annotations

import dataclasses

from chameleon_jax.models.config import PRESETS, LlamaConfig
from chameleon_jax.models.page_layout import PageLayout
from chameleon_jax.scheduler import StepPlan

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Profile:
    """One model on one device (or on `tensor_parallel` of them).

    Times in seconds, rates a second, sizes in bytes.

    Attributes:
        memory: device memory of all devices; `utilization` of it holds weights, scratch and pool.
        bandwidth: bytes a second that kernels read from device memory.
        flops: operations a second of large matrix products.
        prefill_overhead: of a step's prefill part: launches, embedding, sampling.
        lora_overhead: of a step part that has any adapter in it.
        lora_token_rank: LoRA compute of one prompt token and one rank, q k v o.
        lora_row: LoRA compute of one decoding row beside reading its adapter.
        decode_overhead: of a step's decode part.
        host: of the host for a step, before the device gets it.
        link_bandwidth, link_latency: of a host-to-device transfer; transfers queue for the link.
        tp_overhead: of the collectives of one step part for each doubling of `tensor_parallel`.
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
            raise ValueError(f"{self.name}: {self.model.num_params / 1e9:.0f} B parameters leave no room in {self.memory / GIB:.0f} GiB")
        return int(room // self.page_bytes)

    def adapter_pages(self, rank: int, targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")) -> int:
        return self.layout.place(dict.fromkeys(targets, rank)).num_pages


class CostModel:
    """Seconds of step plans on a profile. Holds what does not change between steps."""

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
        return self._prefill(plan) + self._decode(plan)

    def _prefill(self, plan: StepPlan) -> float:
        if not plan.prefills:
            return 0.0
        seconds = self.profile.prefill_overhead + self._collectives
        tokens, lora = 0, 0
        for chunk in plan.prefills:
            n = chunk.num_tokens
            tokens += n
            seconds += self._attention * n * (chunk.start + n / 2)
            if chunk.request.adapter is not None:
                lora += n * self._ranks[chunk.request.adapter]
        if lora:
            seconds += self.profile.lora_overhead + self._lora_token_rank * lora
        return seconds + max(self._weights, self._token * tokens)

    def _decode(self, plan: StepPlan) -> float:
        if not plan.decodes:
            return 0.0
        profile, rows = self.profile, plan.decodes
        context = sum([request.num_computed for request in rows])
        seconds = profile.decode_overhead + self._collectives + max(self._weights, self._token * len(rows))
        seconds += self._kv_token * context
        adapters = {request.adapter for request in rows}
        adapters.discard(None)
        if adapters:
            pages = sum([self._pages[name] for name in adapters])  # type: ignore[index]
            seconds += profile.lora_overhead / 2 + self._page * pages + profile.lora_row * len(rows)
        return seconds

    def load(self, num_bytes: int, copies: int = 1) -> float:
        """Seconds that a transfer holds the link."""
        return copies * (self.profile.link_latency + num_bytes / self.profile.link_bandwidth)


_A40 = Profile(
    name="a40-llama-7b",
    model=PRESETS["llama-7b"],
    memory=48e9,
    bandwidth=560e9,
    flops=101e12,
    prefill_overhead=0.0,
    lora_overhead=0.007,
    lora_token_rank=1.65e-6,
    lora_row=5e-5,
    decode_overhead=0.002,
    host=0.001,
    link_bandwidth=12.9e9,
    link_latency=0.0045,
)
PROFILES: dict[str, Profile] = {"a40-llama-7b": _A40}
