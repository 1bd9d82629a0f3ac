"""Length proxy beside serving: a thread classifies prompts while their requests already wait or run."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque

from chameleon_jax.checkpoints import length_proxy
from chameleon_jax.checks import require
from chameleon_jax.config import EngineConfig
from chameleon_jax.models.length_proxy import ROW_BUCKETS, LengthProxy
from chameleon_jax.request import Request
from chameleon_jax.scheduler.length_predictor import HistoryPredictor, LengthPredictor
from chameleon_jax.scheduler.stats import ProxyCounters

logger = logging.getLogger(__name__)
BATCH = ROW_BUCKETS[-1]
"""Most prompts that are classified together."""


class ProxyPredictor(LengthPredictor):
    """Answers with the fallback's prediction at once, and with the proxy's as soon as its thread has it.

    Serving goes on with the fallback's predictions where the thread fails. One thread owns the predictor; call `close` at the
    end.

    Args:
        proxy: Classifier; compiled here, for every shape.
        fallback: Predictor of all requests at first.
        max_queue_len: Prompts that may wait for the thread. More are left to the fallback.

    Raises:
        ValueError: max_queue_len is below 1.
    """

    def __init__(self, proxy: LengthProxy, fallback: LengthPredictor, *, max_queue_len: int = 1024):
        require(max_queue_len >= 1, "max_queue_len", max_queue_len, "1 or more")
        proxy.warm_up()
        self.counters = ProxyCounters()
        self._proxy = proxy
        self._fallback = fallback
        self._max_queue_len = max_queue_len
        self._waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()  # None: look whether it is closed
        self._done: deque[tuple[Request, int]] = deque()  # appended to by the thread, emptied by its owner
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="length-proxy", daemon=True)
        self._thread.start()

    def predict(self, request: Request) -> int:
        """Return the fallback's prediction, in tokens. The proxy's follows through `updates`."""
        predicted = self._fallback.predict(request)
        if self._closed:
            pass
        elif self._waiting.qsize() >= self._max_queue_len:
            self.counters.skipped += 1
        else:
            self._waiting.put(request)
        return predicted

    def updates(self) -> list[tuple[Request, int]]:
        """Return the proxy's predictions since the last call, each 1 to max_tokens. The fallback's updates are not read."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def observe(self, request: Request) -> None:
        self._fallback.observe(request)

    def forget(self, content_hash: str) -> None:
        self._fallback.forget(content_hash)

    def close(self) -> None:
        """End the thread after its batch. Prompts that wait are dropped; the fallback still answers."""
        self._closed = True
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while len(batch) < BATCH and not self._waiting.empty():
                batch.append(self._waiting.get())
            if self._closed:
                return
            self._predict([request for request in batch if request is not None])

    def _predict(self, batch: list[Request]) -> None:
        try:
            lens = self._proxy.predict_lens([request.prompt_token_ids for request in batch])
            found = [(r, min(max(1, int(n)), r.params.max_tokens)) for r, n in zip(batch, lens, strict=True)]
        except Exception as error:
            if not self.counters.failed:  # the first with its trace; a broken proxy would fill the log
                logger.warning("the length proxy failed; requests keep the fallback's prediction", exc_info=error)
            self.counters.failed += len(batch)
            return
        self.counters.predicted += len(batch)
        self._done.extend(found)


def make_predictor(config: EngineConfig) -> LengthPredictor:
    """Make the predictor that settings ask for. Raises ValueError where the length proxy cannot be read."""
    history = HistoryPredictor(config.predicted_output_len)
    return history if config.length_proxy is None else ProxyPredictor(length_proxy.load(config.length_proxy), history)
