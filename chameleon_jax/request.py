"""A request inside the loop."""

from __future__ import annotations

import dataclasses
import enum
import numbers
from array import array
from collections.abc import MutableSequence, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from chameleon_jax.checks import require
from chameleon_jax.outputs import FinishReason, RequestMetrics
from chameleon_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from chameleon_jax.structured_outputs import Guide


class RequestState(enum.Enum):
    """WAITING -> RUNNING -> FINISHED; RUNNING -> WAITING when the request is preempted."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class TokenStream(Protocol):
    """Incremental detokeniser of one request."""

    def append(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


@dataclasses.dataclass(eq=False)
class Request:
    """One request inside the loop.

    Attributes:
        adapter: Content hash of its adapter, fixed when it was submitted; None for the base model.
        adapter_name: Adapter's name in the request; the sum as text for a mix.
        is_mix: Whether it asked for a mix of adapters.
        prompt_only: Whether its answer is the prompt alone: the one token that it draws takes no room in the sequence.
        stop_ids: Token ids that end it.
        stream: Incremental detokeniser of its output; None where the model has no tokenizer, or its text is complete.
        prompt_logprobs: Log-probabilities of the prompt's tokens by position, each token first; None at the first position and
            where they are not known yet. Empty where they were not requested.
        guide: Grammar of its output; None where the output is free.
        allowed: Bits of the token ids that it can draw, int32, 32 in a word; None where it can draw any.
        adjusts: Whether its logits change before a token is drawn, by more than the temperature.
        priority: Its class; the lowest number is the highest class, which starts first. A request that is preempted for memory
            joins the class of the request that takes its pages, where that is higher.
        order: Place in the order of arrival.
        num_computed: Tokens whose KV the dispatched steps write.
        num_to_prefill: Tokens that were known when it started running; decoding begins behind them.
        num_in_flight: Tokens sampled by dispatched steps that were not collected.
        predicted_output_len: Output tokens that it is expected to take.
        size: Weighted request size (see scheduler.request_size).
        queue: Scheduler queue from which it started last; queue 0 has the smallest requests.
        decode_limit: Value of num_computed at which its next decode needs a page or is one too many.
        slot: Place in the device's `slot_tokens` while it runs.
        pages: KV pages that it owns, in order.
        trace_context: Headers of the caller's trace; None where it has none.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    arrival_time: float
    seed: int
    stop_ids: frozenset[int] = frozenset()
    adapter: str | None = None
    adapter_name: str | None = None
    is_mix: bool = False
    prompt_only: bool = False
    stream: TokenStream | None = None
    guide: Guide | None = None
    allowed: np.ndarray | None = None
    state: RequestState = RequestState.WAITING
    output_token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[dict[int, float] | None] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    priority: int = 0
    order: int = 0
    num_computed: int = 0
    num_to_prefill: int = 0
    num_in_flight: int = 0
    predicted_output_len: int = 1
    size: float = 0.0
    queue: int = 0
    decode_limit: int = 0
    slot: int = -1
    pages: MutableSequence[int] = dataclasses.field(default_factory=lambda: array("i"))
    trace_context: dict[str, str] | None = None
    metrics: RequestMetrics = dataclasses.field(default_factory=lambda: RequestMetrics(0.0))

    def __post_init__(self) -> None:
        self.metrics = RequestMetrics(self.arrival_time)
        self.adjusts = self.params.adjusts_logits
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(self.prompt_token_ids)

    @property
    def num_known(self) -> int:
        """Tokens whose ids the host has: the prompt and the collected output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output, tokens in flight included."""
        return self.num_known + self.num_in_flight

    @property
    def max_total_tokens(self) -> int:
        return len(self.prompt_token_ids) + (0 if self.prompt_only else self.params.max_tokens)

    def token(self, position: int) -> int:
        prompt = len(self.prompt_token_ids)
        return self.prompt_token_ids[position] if position < prompt else self.output_token_ids[position - prompt]


def check_priority(priority: int) -> int:
    """Return the priority of a request as an int. Raises ValueError where it is no integer or takes more than 64 bits."""
    valid = isinstance(priority, numbers.Integral) and -(2**63) <= priority < 2**63
    require(valid, "priority", priority, "a signed 64-bit integer")
    return int(priority)
