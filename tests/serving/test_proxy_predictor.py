from __future__ import annotations

import logging
import threading
import time

import numpy as np
import pytest
from flax import nnx

from chameleon_jax.models.length_proxy import LengthClassifier, LengthProxy, LengthProxyConfig
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler.length_predictor import HistoryPredictor
from chameleon_jax.serving.proxy_predictor import BATCH, ProxyPredictor


class Fallback:
    def __init__(self):
        self.observed: list[Request] = []

    def predict(self, request):
        return 7

    def updates(self):
        return []

    def observe(self, request):
        self.observed.append(request)


class Proxy:
    """Predicts the prompt's first token; a negative one makes it fail. Waits at `gate`."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[int] = []
        self.warm = 0

    def warm_up(self):
        self.warm += 1

    def predict_lens(self, prompts):
        self.entered.set()
        assert self.gate.wait(10)
        self.batches.append(len(prompts))
        if any(p[0] < 0 for p in prompts):
            raise RuntimeError("broken")
        return np.array([p[0] for p in prompts])


def request(tokens: int, max_tokens: int = 100) -> Request:
    return Request(str(tokens), [tokens, 1], SamplingParams(max_tokens=max_tokens), 0.0, 0)


@pytest.fixture
def proxy():
    return Proxy()


@pytest.fixture
def predictor(proxy):
    predictor = ProxyPredictor(proxy, Fallback(), max_queue_len=20)
    yield predictor
    proxy.gate.set()
    predictor.close()
    assert not predictor._thread.is_alive()


def block(predictor, proxy) -> Request:
    """Makes the thread wait inside the proxy, with the returned request."""
    proxy.gate.clear()
    first = request(1)
    predictor.predict(first)
    assert proxy.entered.wait(10)
    return first


def updates(predictor, count: int) -> list[tuple[Request, int]]:
    """Updates until there are `count`, and whatever else comes with them."""
    found, deadline = [], time.monotonic() + 10
    while len(found) < count and time.monotonic() < deadline:
        found += predictor.updates()
        time.sleep(0.001)
    return found


def settle(predictor, count: int) -> None:
    """Waits until the thread is through with `count` requests."""
    deadline = time.monotonic() + 10
    while predictor.counters.predicted + predictor.counters.failed < count and time.monotonic() < deadline:
        time.sleep(0.001)


def test_the_fallback_answers_and_the_proxy_corrects_once(predictor, proxy):
    requests = [block(predictor, proxy), *(request(n) for n in range(2, 2 + BATCH + 3))]
    assert [predictor.predict(r) for r in requests[1:]] == [7] * (BATCH + 3)
    assert predictor.updates() == [] and proxy.warm == 1
    proxy.gate.set()
    found = updates(predictor, len(requests))
    assert [(id(r), n) for r, n in found] == [(id(r), r.prompt_token_ids[0]) for r in requests]
    assert predictor.updates() == []
    assert proxy.batches == [1, BATCH, 3]  # what gathered while the thread was busy goes together
    assert predictor.counters.predicted == len(requests)


def test_predictions_stay_between_1_and_max_tokens(predictor):
    for tokens in (0, 500):
        predictor.predict(request(tokens, max_tokens=100))
    assert [n for _, n in updates(predictor, 2)] == [1, 100]


def test_more_than_the_bound_is_left_to_the_fallback(predictor, proxy):
    block(predictor, proxy)
    assert [predictor.predict(request(2)) for _ in range(25)] == [7] * 25
    assert predictor.counters.skipped == 5
    proxy.gate.set()
    settle(predictor, 21)
    assert len(predictor.updates()) == 21


def test_a_failure_is_logged_once_and_leaves_the_fallback(predictor, caplog):
    with caplog.at_level(logging.WARNING):
        for failures in (1, 2):
            assert predictor.predict(request(-1)) == 7
            settle(predictor, failures)
    assert predictor.updates() == [] and predictor.counters.failed == 2
    assert len(caplog.records) == 1 and "broken" in caplog.text
    predictor.predict(request(5))
    assert [n for _, n in updates(predictor, 1)] == [5]  # and the thread lives


def test_what_ended_is_told_to_the_fallback(predictor):
    ended = request(3)
    predictor.observe(ended)
    assert predictor._fallback.observed == [ended]


def test_close_drops_what_waits_and_may_be_repeated(predictor, proxy):
    block(predictor, proxy)
    for _ in range(10):
        predictor.predict(request(2))
    closing = threading.Thread(target=predictor.close)
    closing.start()
    while not predictor._closed:
        time.sleep(0.001)
    proxy.gate.set()
    closing.join(10)
    assert not predictor._thread.is_alive() and proxy.batches == [1]
    predictor.close()
    assert predictor.predict(request(2)) == 7 and predictor._waiting.qsize() <= 11


def test_a_real_proxy_beside_history():
    config = LengthProxyConfig((10,), window=32, vocab_buckets=64, hidden_size=16, num_heads=2, num_layers=1)
    params = nnx.split(LengthClassifier(config, nnx.Rngs(0)))[1]
    proxy = LengthProxy(config, params, np.array([4, 20]), np.zeros((2, 2)))
    predictor = ProxyPredictor(proxy, HistoryPredictor(prior=7))
    asked = request(3)
    assert predictor.predict(asked) == 7
    assert updates(predictor, 1) == [(asked, proxy.predict_lens([[3, 1]])[0])]
    predictor.close()


def test_a_bad_bound_is_named(proxy):
    with pytest.raises(ValueError, match="max_queue_len is 0"):
        ProxyPredictor(proxy, Fallback(), max_queue_len=0)
