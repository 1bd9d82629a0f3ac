"""Where a request's text ends, and how much of it is certain before it has."""

from __future__ import annotations

from chameleon_jax.request import Request


def cut_at_stop(request: Request, searched: int) -> str | None:
    """Cuts the text before the stop string that what follows `searched` completes, and returns it.

    Stop strings count from the first token after min_tokens on, as in vLLM.
    """
    if request.params.min_tokens and len(request.output_token_ids) <= request.params.min_tokens:
        return None
    for stop in request.params.stop:
        at = request.text.find(stop, max(0, searched - len(stop) + 1))
        if at >= 0:
            request.text = request.text[:at]
            return stop
    return None


def certain_text(request: Request) -> str:
    """The text that no stop string can take back: without an end that may become one, until the request has ended."""
    text = request.text
    if request.finish_reason is not None:
        return text
    end = len(text)
    for stop in request.params.stop:
        at = text.find(stop[0], max(0, len(text) - len(stop) + 1), end)
        while at >= 0 and not stop.startswith(text[at:]):
            at = text.find(stop[0], at + 1, end)
        if at >= 0:
            end = at
    return text[:end]
