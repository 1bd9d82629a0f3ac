"""What comes out of a request: tokens, text, log-probabilities, times."""

from __future__ import annotations

import dataclasses
import enum

from chameleon_jax.sampling_params import LoRARequest


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
