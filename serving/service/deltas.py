"""Output of a request as one piece."""

from __future__ import annotations

from collections.abc import Sequence

from chameleon_jax.outputs import Delta


def join_deltas(deltas: Sequence[Delta]) -> Delta:
    """Join all deltas of one request, the last of which ended it."""
    last = deltas[-1]
    return Delta(
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=None if last.logprobs is None else [position for delta in deltas for position in delta.logprobs or ()],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )
