"""Sampled tokens become text, and requests end: at a stop id, at a stop string, or with their last token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from chameleon_jax.executor import SampledToken
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import Request, RequestState


def process(tokens: Iterable[SampledToken], now: float) -> Iterator[Request]:
    """Append a step's tokens to their requests, one after the other.

    A request that ends is to be removed before the next is asked for, so that an exception in between leaves none past its end.

    Args:
        tokens: Tokens of one step. A token of a request that has ended meanwhile is dropped.
        now: Time of their arrival, seconds of the engine's clock.

    Yields:
        Each request that got a token. One that ends with it has a `finish_reason`.
    """
    for sampled in tokens:
        request = sampled.request
        request.num_in_flight -= 1
        if request.state is RequestState.FINISHED:
            continue
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = now
        append_token(request, sampled)
        yield request


def append_token(request: Request, sampled: SampledToken) -> None:
    """Append one token and its text, and end the request where it is the last."""
    token, params = sampled.token_id, request.params
    request.output_token_ids.append(token)
    if sampled.logprobs is not None:
        request.logprobs.append(sampled.logprobs)
    stops = token in request.stop_ids
    if request.guide is not None:
        if not stops:
            request.guide.accept(token)
        if request.guide.error:
            finish(request, FinishReason.ERROR, f"its structured output could not go on: {request.guide.error}")
            return
    if request.stream is not None and (not stops or params.include_stop_str_in_output):
        searched = len(request.text)
        request.text += request.stream.append(token)
        stop = trim_at_stop(request, searched)
        if stop is not None:
            request.stream = None  # nothing that it holds back belongs to the text
            finish(request, FinishReason.STOP, stop)
            return
    if stops:
        finish(request, FinishReason.STOP, token if token in params.stop_token_ids else None)
    elif request.guide is not None and request.guide.complete:
        finish(request, FinishReason.STOP)
    elif len(request.output_token_ids) >= params.max_tokens:
        finish(request, FinishReason.LENGTH)


def finish(request: Request, reason: FinishReason, stop_reason: str | int | None = None) -> None:
    """Set why a request ends, and complete its text. A stop string that only its last characters complete counts."""
    request.finish_reason, request.stop_reason = reason, stop_reason
    if request.stream is None:
        return
    searched = len(request.text)
    request.text += request.stream.flush()
    if reason is FinishReason.LENGTH and (stop := trim_at_stop(request, searched)) is not None:
        request.finish_reason, request.stop_reason = FinishReason.STOP, stop


def trim_at_stop(request: Request, searched: int) -> str | None:
    """Cut the text at a stop string that the characters from `searched` on complete, and return that string.

    Of several it is the one that is complete first, so that the cut does not depend on how the text came in tokens; of several
    that end at one place, the longest. Stop strings count from the first token after min_tokens on, as in vLLM.
    """
    params, text = request.params, request.text
    if not params.stop or (params.min_tokens and len(request.output_token_ids) <= params.min_tokens):
        return None
    found = []
    for stop in params.stop:
        at = text.find(stop, max(0, searched - len(stop) + 1))
        if at >= 0:
            found.append((at + len(stop), at, stop))
    if not found:
        return None
    end, begin, stop = min(found)
    request.text = text[: end if params.include_stop_str_in_output else begin]
    return stop


def stable_text(request: Request) -> str:
    """Text that no stop string can take back: all of it once the request has ended, before without a stop string's begin."""
    text = request.text
    if request.finish_reason is not None or request.params.include_stop_str_in_output:
        return text
    end = len(text)
    for stop in request.params.stop:
        at = text.find(stop[0], max(0, len(text) - len(stop) + 1), end)
        while at >= 0 and not stop.startswith(text[at:]):
            at = text.find(stop[0], at + 1, end)
        if at >= 0:
            end = at
    return text[:end]


@dataclasses.dataclass(frozen=True)
class OutputSnapshot:
    """Output of a request after a step.

    A request's tokens and log-probabilities only ever grow. So another thread may read the first `num_tokens` of them: they do
    not change.

    Attributes:
        text: Text that no stop string can take back.
        num_tokens: Output tokens so far.
        finished: Nothing follows; `request.finish_reason` is set.
    """

    request: Request
    text: str
    num_tokens: int
    finished: bool

    @classmethod
    def of(cls, request: Request) -> OutputSnapshot:
        return cls(request, stable_text(request), len(request.output_token_ids), request.finish_reason is not None)

    @property
    def finish_reason(self) -> str | None:
        reason = self.request.finish_reason if self.finished else None
        return None if reason is None else reason.value

    @property
    def stop_reason(self) -> str | int | None:
        return self.request.stop_reason if self.finished else None
