"""How big a request is to the queues (paper, section 4.2)."""

from __future__ import annotations

from chameleon_jax.request import Request

INPUT_WEIGHT, OUTPUT_WEIGHT = 0.4, 0.6


class RequestSizer:
    """Weighted request size: (A input / max input + B output / max output) x adapter pages / max adapter pages.

    The maxima are those of the requests seen so far (the paper does not say which), so sizes are in (0, 1] at the time they
    are taken. A request without an adapter counts as one with the smallest adapter there can be, of one page.

    Args:
        output_only: the predicted output alone, for comparison.
    """

    def __init__(self, output_only: bool = False):
        self._output_only = output_only
        self._max_input = self._max_output = self._max_adapter = 1

    def size(self, request: Request, adapter_pages: int) -> float:
        output, adapter_pages = request.predicted_output_len, max(adapter_pages, 1)
        self._max_output = max(self._max_output, output)
        if self._output_only:
            return output / self._max_output
        tokens = len(request.prompt_token_ids)
        self._max_input = max(self._max_input, tokens)
        self._max_adapter = max(self._max_adapter, adapter_pages)
        length = INPUT_WEIGHT * tokens / self._max_input + OUTPUT_WEIGHT * output / self._max_output
        return length * adapter_pages / self._max_adapter
