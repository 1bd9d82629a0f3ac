"""A request: what was asked, where it stands, what came out."""

from __future__ import annotations

import dataclasses
import enum
import numbers
import reprlib
from array import array
from collections.abc import MutableSequence, Sequence
from typing import Protocol

MAX_STOP_IDS = 8
MAX_STOPS = 16
MAX_STOP_LEN = 256
"""Characters of a stop string: after each token the text's end is compared with every one of them."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Names and defaults are vLLM's.

    Attributes:
        temperature: 0 is greedy, and so is a value below 1.2e-38, by which float32 cannot divide. No other is changed.
        top_p: share of the probability mass that is kept, in (0, 1].
        top_k: tokens that are kept; 0 or -1 keeps all, 1 is greedy.
        min_p: least probability, relative to the best token's, that is kept.
        seed: the same seed gives the same text however the request was batched; None: the engine draws one.
        max_tokens: output tokens at most.
        min_tokens: stop ids cannot be drawn before that many, unless there is nothing else.
        stop: strings that end the output, the first to be complete; they are not part of it.
        stop_token_ids: ids that end the output, beside the model's own.
        ignore_eos: go on past the model's end-of-sequence ids.
        logprobs: how many alternatives to report for each token, 0 to 20; None reports none.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string, or the text of the id, that ends the output.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        def require(condition: bool, field: str, allowed: str) -> None:
            if not condition:
                raise ValueError(f"{field} is {reprlib.repr(getattr(self, field))}; allowed: {allowed}")

        for field in ("temperature", "top_p", "min_p"):
            require(isinstance(getattr(self, field), numbers.Real), field, "a number")
        for field in ("top_k", "seed", "max_tokens", "min_tokens", "logprobs"):
            value = getattr(self, field)
            require(
                isinstance(value, numbers.Integral) or (value is None and field in ("seed", "logprobs")), field, "an integer"
            )
            object.__setattr__(self, field, value if value is None else int(value))
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        require(0 <= self.temperature <= 100, "temperature", "0 to 100")
        require(0 < self.top_p <= 1, "top_p", "above 0, at most 1")
        require(-1 <= self.top_k < 2**31, "top_k", "-1 or 0 (all), or 1 and more")
        require(0 <= self.min_p <= 1, "min_p", "0 to 1")
        require(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", "a 64-bit integer")
        require(self.max_tokens >= 1, "max_tokens", "1 or more")
        require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "0 to max_tokens")
        require(len(self.stop) <= MAX_STOPS, "stop", f"at most {MAX_STOPS} strings")
        texts = all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LEN for s in self.stop)
        require(texts, "stop", f"strings of 1 to {MAX_STOP_LEN} characters")
        require(len(self.stop_token_ids) <= MAX_STOP_IDS, "stop_token_ids", f"at most {MAX_STOP_IDS} ids")
        require(self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "0 to 20")


@dataclasses.dataclass(frozen=True)
class LoRARequest:
    """Names an adapter.

    Attributes:
        path: PEFT directory, needed only the first time the name is used, or to replace it.
        load_inplace: read `path` also where the name was read from it before: its files may have changed.
    """

    name: str
    path: str | None = None
    load_inplace: bool = False


class RequestState(enum.Enum):
    """WAITING -> RUNNING -> FINISHED; RUNNING -> WAITING when the request is squashed to make room."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """ABORT: somebody gave it up; ERROR: it could not go on, `stop_reason` says why."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


LEAST_LOGPROB = -9999.0
"""Log-probability of a token that cannot come, as in OpenAI's API: JSON has no word for -inf or no number."""


@dataclasses.dataclass(frozen=True)
class Logprob:
    """Log-probability of a token (natural logarithm, before temperature), and the token.

    Attributes:
        decoded_token: its text where it stands; `bytes:\\xe2\\x82` where it is part of a character; a special token's name.
        token_bytes: what it adds to the text's UTF-8 bytes; nothing where the text leaves it out.
    """

    logprob: float
    decoded_token: str | None = None
    token_bytes: bytes | None = None


@dataclasses.dataclass
class RequestMetrics:
    """Times of the engine's clock, in seconds.

    Attributes:
        num_squashes: recomputations, for memory or since the device failed.
        num_faults: failures of the device that it outlived.
        adapter_was_resident: whether the adapter was there when the request's turn came; None: it has none, or no turn yet.
        adapter_awaited_since: when its turn first came while its adapter was not there and others could pass.
        adapter_wait: seconds by which the adapter's load delayed the request after its turn had come.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_squashes: int = 0
    num_faults: int = 0
    adapter_was_resident: bool | None = None
    adapter_awaited_since: float | None = None
    adapter_wait: float = 0.0


@dataclasses.dataclass
class CompletionOutput:
    """`finish_reason` is "stop", "length", "abort" or "error", None while running; `stop_reason` the string or id that ended
    it, or what went wrong."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclasses.dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    lora_request: LoRARequest | None
    metrics: RequestMetrics


class TokenStream(Protocol):
    """Incremental detokeniser of one request."""

    def append(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


@dataclasses.dataclass(eq=False)
class Request:
    """One request inside the loop.

    Attributes:
        adapter: content hash of its adapter, fixed when it was submitted; None for the base model.
        stop_ids: every token id that ends it.
        order: place in the order of arrival.
        num_computed: tokens whose KV the dispatched steps write.
        num_to_prefill: tokens that were known when it started running; decoding begins behind them.
        num_in_flight: tokens sampled by dispatched steps that were not collected.
        predicted_output_len: output tokens it is expected to take.
        size: its weighted request size (see scheduler.request_size).
        queue: that of the scheduler's queues from which it started last; 0 is that of the smallest requests.
        decode_limit: the value of num_computed at which its next decode needs a page or is one too many.
        slot: its place in the device's `slot_tokens` while it runs.
        pages: KV pages it owns, in order.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    arrival_time: float
    seed: int
    stop_ids: frozenset[int] = frozenset()
    adapter: str | None = None
    adapter_name: str | None = None
    stream: TokenStream | None = None
    state: RequestState = RequestState.WAITING
    output_token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
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
    metrics: RequestMetrics = dataclasses.field(default_factory=lambda: RequestMetrics(0.0))

    def __post_init__(self) -> None:
        self.metrics = RequestMetrics(self.arrival_time)

    @property
    def num_known(self) -> int:
        """Tokens whose ids the host has: the prompt and what was collected."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output, tokens in flight included."""
        return self.num_known + self.num_in_flight

    @property
    def num_outputs(self) -> int:
        return len(self.output_token_ids) + self.num_in_flight

    @property
    def max_total_tokens(self) -> int:
        return len(self.prompt_token_ids) + self.params.max_tokens

    def token(self, position: int) -> int:
        prompt = len(self.prompt_token_ids)
        return self.prompt_token_ids[position] if position < prompt else self.output_token_ids[position - prompt]
