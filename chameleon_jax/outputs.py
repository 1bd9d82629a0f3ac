"""Output of a request: tokens, text, log-probabilities, times."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

from chameleon_jax.sampling_params import LoRARequest


class FinishReason(enum.Enum):
    """Reason for which a request ended."""

    STOP = "stop"  # a stop string or a stop id
    LENGTH = "length"  # max_tokens
    ABORT = "abort"  # by its client
    ERROR = "error"  # it could not go on; `stop_reason` says why


LEAST_LOGPROB = -9999.0
"""Log-probability of a token that cannot be drawn, as in OpenAI's API: JSON has neither -inf nor NaN."""


@dataclasses.dataclass(frozen=True)
class Logprob:
    """Log-probability of one token, and the token.

    Attributes:
        logprob: natural logarithm of the probability, before temperature.
        decoded_token: text of the token at its place; `bytes:\\xe2\\x82` for part of a character; the name of a special token.
        token_bytes: UTF-8 bytes that the token adds to the text; empty where the text leaves it out.
    """

    logprob: float
    decoded_token: str | None = None
    token_bytes: bytes | None = None


@dataclasses.dataclass
class RequestMetrics:
    """Times and counts of one request. Times are seconds of the engine's monotonic clock; None until they happen.

    The properties are vLLM's names of the same facts. vLLM's `arrival_time` is a time of day; this one is not.

    Attributes:
        arrival_time: the request was submitted.
        first_scheduled_time: it first started to run.
        first_token_time: its first token was sampled and collected.
        finished_time: it ended.
        num_preemptions: times that it was preempted and recomputed, for memory, as a bypasser, or because the device failed.
        num_faults: failures of the device that it outlived.
        adapter_was_resident: whether its adapter was in the pool when its turn came; None without an adapter or a turn.
        adapter_awaited_since: its turn first came while its adapter was not in the pool and others could pass.
        adapter_wait: seconds by which the adapter's load delayed the request after its turn had come.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_faults: int = 0
    adapter_was_resident: bool | None = None
    adapter_awaited_since: float | None = None
    adapter_wait: float = 0.0

    @property
    def scheduled_ts(self) -> float | None:
        """Time at which it first started to run: `first_scheduled_time`."""
        return self.first_scheduled_time

    @property
    def first_token_ts(self) -> float | None:
        """Time of its first token: `first_token_time`."""
        return self.first_token_time

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival until it first started to run."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def first_token_latency(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclasses.dataclass
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: place among the completions of the prompt, from 0.
        text: text so far.
        token_ids: tokens so far, those that the text leaves out among them.
        finish_reason: "stop", "length", "abort" or "error"; None while running.
        stop_reason: stop string or stop id that ended the completion, or the message of the error; None otherwise.
        logprobs: alternatives of each token by id, the chosen token first; None unless asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclasses.dataclass
class RequestOutput:
    """Output of one request, whole or so far.

    Attributes:
        request_id: id of the request.
        prompt: prompt as text; None where it was given as token ids.
        prompt_token_ids: prompt as token ids.
        outputs: completions of the prompt; always one.
        finished: whether all completions have ended.
        lora_request: adapter of the request; None for the base model.
        metrics: times and counts.
        prompt_logprobs: alternatives of each token of the prompt by id, the token itself first; None at the first token; None
            unless asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    lora_request: LoRARequest | None
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclasses.dataclass(frozen=True)
class Delta:
    """Output since the last read of a stream. Text may lag behind the tokens: characters and stop strings end in later ones.

    Attributes:
        text: New text.
        token_ids: New tokens.
        logprobs: One mapping for each of `token_ids`, the chosen token first; None where the request did not ask for them.
        finish_reason: "stop", "length" or "abort" in the last delta, None before.
        stop_reason: String or id that ended the request, or None.
    """

    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @classmethod
    def join(cls, deltas: Sequence[Delta]) -> Delta:
        """Join all deltas of one request, the last of which ended it."""
        last = deltas[-1]
        return cls(
            text="".join(delta.text for delta in deltas),
            token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
            logprobs=None if last.logprobs is None else [position for delta in deltas for position in delta.logprobs or ()],
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
        )
