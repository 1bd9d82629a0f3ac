"""What callers get of a request: everything so far, or what is new since they last looked."""

from __future__ import annotations

import dataclasses
import itertools

from chameleon_jax.checkpoints.detokenizer import shown
from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.output_processor import certain_text
from chameleon_jax.outputs import LEAST_LOGPROB, CompletionOutput, Logprob, RequestOutput
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import LoRARequest


@dataclasses.dataclass(frozen=True)
class Update:
    """Where a request stands after a step. The tokens and log-probabilities of a request only ever grow, so that whoever reads
    the first `num_tokens` of them in another thread reads what does not change.

    Attributes:
        text: what no stop string can take back.
        finished: nothing follows; `request.finish_reason` is set.
    """

    request: Request
    text: str
    num_tokens: int
    finished: bool

    @classmethod
    def of(cls, request: Request) -> Update:
        return cls(request, certain_text(request), len(request.output_token_ids), request.finish_reason is not None)

    @property
    def finish_reason(self) -> str | None:
        reason = self.request.finish_reason if self.finished else None
        return None if reason is None else reason.value

    @property
    def stop_reason(self) -> str | int | None:
        return self.request.stop_reason if self.finished else None


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one read of a stream adds. Text may lag behind the tokens: characters and stop strings end in later ones.

    Attributes:
        logprobs: one mapping for each of `token_ids`, the chosen token first; None: not asked for.
        finish_reason: "stop", "length" or "abort" in the last delta, None before.
        stop_reason: the string or id that ended it, or None.
    """

    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


def logprobs_of(request: Request, begin: int, end: int, tokenizer: Tokenizer | None) -> list[dict[int, Logprob]] | None:
    """Those of output tokens `begin` to `end`, with the tokens as they stand in the text; None where the request has none."""
    if request.params.logprobs is None:
        return None
    positions = request.logprobs[begin:end]
    if tokenizer is None:
        return [{t: Logprob(max(LEAST_LOGPROB, value)) for t, value in position.items()} for position in positions]
    tokens, left_out = tokenizer.token_bytes, tokenizer.token_bytes.left_out(request.params.skip_special_tokens)
    has_begun = bool(tokens.end_of(request.prompt_token_ids, left_out)) or tokens.have_text(
        itertools.islice(request.output_token_ids, begin), left_out
    )
    found = []
    for token_id, position in zip(request.output_token_ids[begin:end], positions):
        bytes_of = tokens.inside if has_begun else tokens.at_start
        found.append({t: _logprob(value, bytes_of(t), t in left_out) for t, value in position.items()})
        has_begun = has_begun or tokens.have_text([token_id], left_out)
    return found


def _logprob(value: float, data: bytes, is_left_out: bool) -> Logprob:
    return Logprob(max(LEAST_LOGPROB, value), shown(data), b"" if is_left_out else data)


def make_delta(update: Update, before: Update | None, tokenizer: Tokenizer | None) -> Delta:
    """What `update` adds to `before`."""
    request = update.request
    begin, shown = (0, 0) if before is None else (before.num_tokens, len(before.text))
    return Delta(
        text=update.text[shown:],
        token_ids=request.output_token_ids[begin : update.num_tokens],
        logprobs=logprobs_of(request, begin, update.num_tokens, tokenizer),
        finish_reason=update.finish_reason,
        stop_reason=update.stop_reason,
    )


def make_output(
    update: Update, prompt: str | None, lora: LoRARequest | None, logprobs: list[dict[int, Logprob]] | None
) -> RequestOutput:
    """Everything a request has produced so far. Args: logprobs: `logprobs_of` all its tokens."""
    request = update.request
    token_ids = request.output_token_ids[: update.num_tokens]
    completion = CompletionOutput(0, update.text, token_ids, update.finish_reason, update.stop_reason, logprobs)
    return RequestOutput(
        request_id=request.request_id,
        prompt=prompt,
        prompt_token_ids=list(request.prompt_token_ids),
        outputs=[completion],
        finished=update.finished,
        lora_request=lora,
        metrics=request.metrics,
    )
