"""Snapshots of a request, and the deltas and outputs that callers get from them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from chameleon_jax.checkpoints.detokenizer import TokenBytes, shown
from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.output_processor import OutputSnapshot
from chameleon_jax.outputs import LEAST_LOGPROB, CompletionOutput, Delta, Logprob, RequestOutput
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import LoRARequest


def logprobs_of(request: Request, begin: int, end: int, tokenizer: Tokenizer | None) -> list[dict[int, Logprob]] | None:
    """Log-probabilities of output tokens `begin` to `end`, with the tokens as they stand in the text.

    None where the request did not ask for them.
    """
    if request.params.logprobs is None:
        return None
    positions = request.logprobs[begin:end]
    if tokenizer is None:
        return [_without_texts(position) for position in positions]
    tokens, left_out = tokenizer.token_bytes, tokenizer.token_bytes.left_out(request.params.skip_special_tokens)
    has_begun = bool(tokens.end_of(request.prompt_token_ids, left_out)) or tokens.have_text(
        itertools.islice(request.output_token_ids, begin), left_out
    )
    return list(_with_texts(request.output_token_ids[begin:end], positions, tokens, left_out, has_begun))


def prompt_logprobs_of(request: Request, tokenizer: Tokenizer | None) -> list[dict[int, Logprob] | None] | None:
    """Log-probabilities of the prompt's tokens, None at the first one. None where the request did not ask for them."""
    if request.params.prompt_logprobs is None:
        return None
    positions = [position or {} for position in request.prompt_logprobs]
    if tokenizer is None:
        found = [_without_texts(position) for position in positions]
    else:
        left_out = tokenizer.token_bytes.left_out(request.params.skip_special_tokens)
        found = list(_with_texts(request.prompt_token_ids, positions, tokenizer.token_bytes, left_out, has_begun=False))
    return [position or None for position in found]


def _without_texts(position: dict[int, float]) -> dict[int, Logprob]:
    return {t: Logprob(max(LEAST_LOGPROB, value)) for t, value in position.items()}


def _with_texts(
    token_ids: Iterable[int],
    positions: Iterable[dict[int, float]],
    tokens: TokenBytes,
    left_out: frozenset[int],
    has_begun: bool,
) -> Iterator[dict[int, Logprob]]:
    """Give the alternatives of consecutive tokens their texts.

    Args:
        token_ids: Tokens at the positions.
        positions: Log-probabilities by id.
        tokens: Bytes of all tokens.
        left_out: Ids that the text leaves out.
        has_begun: Whether the text has begun before the first token.
    """
    for token_id, position in zip(token_ids, positions):
        bytes_of = tokens.inside if has_begun else tokens.at_start
        yield {t: _logprob(value, bytes_of(t), t in left_out) for t, value in position.items()}
        has_begun = has_begun or tokens.have_text([token_id], left_out)


def _logprob(value: float, data: bytes, is_left_out: bool) -> Logprob:
    return Logprob(max(LEAST_LOGPROB, value), shown(data), b"" if is_left_out else data)


def make_delta(snapshot: OutputSnapshot, before: OutputSnapshot | None, tokenizer: Tokenizer | None) -> Delta:
    """Output that `snapshot` adds to `before`."""
    request = snapshot.request
    begin, shown = (0, 0) if before is None else (before.num_tokens, len(before.text))
    return Delta(
        text=snapshot.text[shown:],
        token_ids=request.output_token_ids[begin : snapshot.num_tokens],
        logprobs=logprobs_of(request, begin, snapshot.num_tokens, tokenizer),
        finish_reason=snapshot.finish_reason,
        stop_reason=snapshot.stop_reason,
    )


def make_output(
    snapshot: OutputSnapshot,
    prompt: str | None,
    lora: LoRARequest | None,
    logprobs: list[dict[int, Logprob]] | None,
    prompt_logprobs: list[dict[int, Logprob] | None] | None,
) -> RequestOutput:
    """Make the output of a request so far.

    Args:
        snapshot: The request after its last step.
        prompt: Text of the prompt, where it came as text.
        lora: Adapter that it came with.
        logprobs: `logprobs_of` all its tokens.
        prompt_logprobs: `prompt_logprobs_of` it.
    """
    request = snapshot.request
    token_ids = request.output_token_ids[: snapshot.num_tokens]
    completion = CompletionOutput(0, snapshot.text, token_ids, snapshot.finish_reason, snapshot.stop_reason, logprobs)
    return RequestOutput(
        request_id=request.request_id,
        prompt=prompt,
        prompt_token_ids=list(request.prompt_token_ids),
        outputs=[completion],
        finished=snapshot.finished,
        lora_request=lora,
        metrics=request.metrics,
        prompt_logprobs=prompt_logprobs,
    )
