"""Size of a request: in pages of the pool, and as the queues compare it (paper, section 4.2)."""

from __future__ import annotations

from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.request import Request

INPUT_WEIGHT, OUTPUT_WEIGHT = 0.4, 0.6


class PageNeeds:
    """Pages that a request takes from the pool.

    Args:
        cache: every adapter that a request may name.
        page_tokens: tokens of a page.
        reserve: output tokens that are reserved, as in `System.reserve`; for "peak" none but the next.
    """

    def __init__(self, cache: AdapterCache, page_tokens: int, reserve: str = "predicted"):
        self._cache = cache
        self._page_tokens = page_tokens
        self._reserve = reserve

    def kv(self, request: Request) -> int:
        """KV pages with which the request starts: for its prompt and for the output that is reserved."""
        output = request.params.max_tokens
        if self._reserve != "max_tokens":
            predicted = request.predicted_output_len if self._reserve == "predicted" else 0
            output = min(output, max(predicted, len(request.output_token_ids) + 1))
        return -(-min(len(request.prompt_token_ids) + output, request.max_total_tokens) // self._page_tokens)

    def adapter(self, request: Request) -> int:
        """Pages of the request's adapter; 0 without one."""
        return 0 if request.adapter is None else self._cache.entry(request.adapter).info.num_pages

    def missing_adapter(self, request: Request) -> int:
        """Pages of the request's adapter that no running request holds already."""
        if request.adapter is None:
            return 0
        entry = self._cache.entry(request.adapter)
        return 0 if entry.references else entry.info.num_pages


class RequestSizer:
    """Weighted request size: (A input / max input + B output / max output) x adapter pages / max adapter pages.

    The maxima are taken over the requests seen so far (the paper does not say which), so a size is in (0, 1] when it is
    computed. A request without an adapter counts as one with the smallest possible adapter, of one page.

    Args:
        output_only: use the predicted output alone, for comparison.
    """

    def __init__(self, output_only: bool = False):
        self._output_only = output_only
        self._max_input = self._max_output = self._max_adapter = 1

    def size(self, request: Request, adapter_pages: int) -> float:
        """Compute the size of a request whose output length is predicted, and raise the maxima to it."""
        output, adapter_pages = request.predicted_output_len, max(adapter_pages, 1)
        self._max_output = max(self._max_output, output)
        if self._output_only:
            return output / self._max_output
        tokens = len(request.prompt_token_ids)
        self._max_input = max(self._max_input, tokens)
        self._max_adapter = max(self._max_adapter, adapter_pages)
        length = INPUT_WEIGHT * tokens / self._max_input + OUTPUT_WEIGHT * output / self._max_output
        return length * adapter_pages / self._max_adapter
