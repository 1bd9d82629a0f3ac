"""Where a request's text ends, and how much of it is certain before it has."""

from __future__ import annotations

from chameleon_jax.request import Request


def cut_at_stop(request: Request, searched: int) -> str | None:
    """Cuts the text at the stop string that what follows `searched` completes, and returns it.

    Of several it is the one that is complete first, so that it does not matter how the text came in tokens; of those that end
    at one place, the longest. Stop strings count from the first token after min_tokens on, as in vLLM.
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


def certain_text(request: Request) -> str:
    """The text that no stop string can take back: without an end that may become one, until the request has ended."""
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
